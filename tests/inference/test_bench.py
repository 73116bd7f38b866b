"""`timm_nf.inference.bench` and `timm-nf bench`: who is compared with whom, in turn, and what is printed."""

import json
from typing import Any

import pytest
import timm
import torch
from timm.models import is_model

from timm_nf.cli import main
from timm_nf.inference import bench
from timm_nf.variants import VARIANTS


def test_every_network_stands_beside_timms_own():
    assert bench.stock_name("nfnet_f3") == "dm_nfnet_f3"
    assert bench.stock_name("dm_nf_resnet50") == "nf_resnet50"
    assert bench.stock_name("dm_nf_regnet_b1") == "nf_regnet_b1"
    assert bench.stock_name("eca_nfnet_l0") == "eca_nfnet_l0"
    assert all(not is_model(stock) or stock not in VARIANTS for stock in map(bench.stock_name, VARIANTS))


def test_contenders_are_what_this_machine_can_run(monkeypatch):
    monkeypatch.setattr(bench, "bfloat16_is_fast", lambda device: True)
    everything = list(bench.contenders("nfnet_f0", 1, 64))
    assert everything == [
        *("stock", "stock, channels_last", "timm_nf", "timm_nf, channels_last", "fused", "fused, channels_last"),
        *("fused, bfloat16", "fused, compiled", "fused, onnxruntime", "fused, int8"),
    ]
    assert "timm_nf" not in bench.contenders("nf_resnet50", 1, 64)
    assert "stock" not in bench.contenders("nfnet_f7_plus", 1, 64)
    assert bench.left_out() == {}
    monkeypatch.setattr(bench, "bfloat16_is_fast", lambda device: False)
    monkeypatch.setattr(bench.export, "onnx_is_installed", lambda: False)
    with bench.inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert list(bench.contenders("nfnet_f0", 1, 64)) == everything[:6]
        assert list(bench.left_out()) == everything[6:]
    assert list(bench.left_out("cuda")) == ["fused, bfloat16", *everything[8:]]


@pytest.mark.parametrize(
    ("instructions", "fast"),
    [
        ({"avx512_bf16": True}, True),
        ({"amx_tile": True, "amx_bf16": True}, True),
        ({"bf16": True}, True),  # ARM
        ({"avx512_f": True, "avx512_bf16": False, "cpu_name": "bf16"}, False),
        ({}, False),
    ],
)
def test_bfloat16_is_fast_where_the_cpu_has_instructions_for_it(monkeypatch, instructions, fast):
    monkeypatch.setattr(bench.torch.cpu, "get_capabilities", lambda: instructions, raising=False)
    assert bench.bfloat16_is_fast() is fast
    assert bench.bfloat16_is_fast("cuda")


@pytest.mark.parametrize(
    ("cpuinfo", "fast"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 amx_tile\n", True),
        ("flags\t\t: fpu avx512f\n", False),
        ("Features\t: fp asimd bf16\n", True),
        (None, False),  # macOS, Windows
    ],
)
def test_where_torch_cannot_tell_the_kernel_is_asked(monkeypatch, tmp_path, cpuinfo, fast):
    monkeypatch.delattr(bench.torch.cpu, "get_capabilities", raising=False)
    file = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        file.write_text(cpuinfo)
    monkeypatch.setattr(bench, "Path", lambda name: file)
    assert bench.bfloat16_is_fast() is fast


def test_runs_take_turns_and_the_first_two_rounds_do_not_count():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    times = bench.time_in_turn(runs, 3)
    assert "".join(order) == "abc" * 5
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_on_an_accelerator_time_is_that_between_two_events_in_its_queue(monkeypatch):
    order = []

    class Event:
        def __init__(self, device, enable_timing):
            assert (device, enable_timing) == ("cuda:1", True)

        def record(self):
            order.append("event")

        def elapsed_time(self, end):
            order.append("read")
            return 7.0

    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: order.append("wait"))
    times = bench.time_in_turn({"a": lambda: order.append("run")}, 3, "cuda:1")
    assert times == {"a": [7.0, 7.0, 7.0]}
    assert order == ["wait", "event", "run", "event", "wait", "read"] * 5


def test_peak_memory_is_that_of_the_highest_point():
    def run():
        a = torch.ones(1 << 20)
        b = a + 1
        del a
        return b * 2

    assert bench.peak_memory(run) == pytest.approx(2 * 4 << 20, rel=1e-3)  # and a few bytes for the scalars


@pytest.mark.slow
def test_int8_is_timed_beside_float32(monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: create("test_nfnet", **kwargs))
    builders = bench.contenders("nfnet_f0", 2, 64)
    work = {label: builders[label] for label in ("fused, onnxruntime", "fused, int8")}
    assert all(timing.median > 0 for timing in bench.time_inference(work, 3).values())


@pytest.fixture
def small(monkeypatch):
    """Whatever is created is a small network instead."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: create("test_nfnet", **kwargs))
    for slow in ("compiled", "onnxruntime", "int8"):
        original = bench.contenders
        monkeypatch.setattr(
            bench, "contenders", lambda *a, o=original, s=slow: {k: v for k, v in o(*a).items() if not k.endswith(s)}
        )


def test_the_command_prints_ratios_to_the_first_row(small, capsys):
    main(["bench", "nfnet_f0", "--size", "64", "--repeats", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["median", "ms", "quartiles", "ratio", "to", "stock"]
    assert lines[1].startswith("stock")
    assert lines[1].endswith("1.00x")
    assert [line for line in lines if line.startswith("fused, channels_last")]
    assert any("batch 1, 64 px, cpu" in line for line in lines)


def test_the_command_names_what_it_leaves_out_and_why(small, capsys, monkeypatch):
    monkeypatch.setattr(bench.torch.cpu, "get_capabilities", lambda: {"avx512_f": True}, raising=False)
    main(["bench", "nfnet_f0", "--size", "64", "--repeats", "3", "--json"])
    printed = capsys.readouterr()
    assert "left out: fused, bfloat16: the CPU has no bfloat16 instructions" in printed.err
    assert "fused, bfloat16" not in json.loads(printed.out)["milliseconds"]


def test_the_command_prints_json(small, capsys):
    main(["bench", "nf_resnet50", "--size", "64", "--repeats", "3", "--batch", "2", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert (facts["model"], facts["batch"], facts["size"], facts["device"]) == ("nf_resnet50", 2, 64, "cpu")
    for timing in facts["milliseconds"].values():
        assert 0 < timing["low"] <= timing["median"] <= timing["high"]


def test_an_unknown_network_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "nfnet_f99"])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no network or folder is called 'nfnet_f99' (did you mean nfnet_f7" in line
    assert "`timm-nf list` shows ours" in line


@pytest.mark.slow
@pytest.mark.parametrize("label", ["fused, compiled", "fused, onnxruntime"])
def test_compiled_and_exported_contenders_run(label, monkeypatch):
    create = timm.create_model
    small = {"depths": (1, 1, 1, 1), "channels": (32, 64, 96, 96), "group_size": 8}
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: create(name, **small, **kwargs))
    builders = bench.contenders("nfnet_f0", 2, 64)
    timings = bench.time_inference({label: builders[label]}, repeats=3)
    assert timings[label].median > 0


@pytest.mark.slow
def test_the_compiled_contender_has_its_weights_frozen(monkeypatch):
    create, built = timm.create_model, []
    small = {"depths": (1, 1, 1, 1), "channels": (32, 64, 96, 96), "group_size": 8}
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: create(name, **small, **kwargs))
    fuse = bench.fuse
    monkeypatch.setattr(bench, "fuse", lambda model: built.append(fuse(model)) or built[-1])
    work = bench.contenders("nfnet_f0", 2, 64)["fused, compiled"]()
    with torch.no_grad():
        before: Any = work()
        convolutions = [module for module in built[0].modules() if isinstance(module, torch.nn.Conv2d)]
        for convolution in convolutions:
            convolution.weight.mul_(2)
        after: Any = work()
        assert torch.equal(after, before)

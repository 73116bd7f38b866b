"""`python -m scripts.check_tools`: environments, the probes' processes, verdicts, and that the page has every probe."""

import json
import re
import sys

import pytest
import torch
from torch import nn

from scripts.check_tools import __main__ as command
from scripts.check_tools import environments, page, probes
from scripts.check_tools.environments import Answer, Outcome, ToolError
from scripts.check_tools.probes import PROBES, Measured
from tests.support import ROOT

# Those that the page is about, as pip names them.
NAMED = {
    *("accelerate", "captum", "coremltools", "fastai", "fvcore", "grad-cam", "kornia", "lightly", "lightning", "nncf"),
    *("onnxsim", "opacus", "open_clip_torch", "openvino", "optimum-quanto", "peft", "ptflops", "skorch", "thop"),
    *("segmentation-models-pytorch", "torch-pruning", "torchao", "torchinfo", "transformers", "zennit"),
}


# -- environments and processes ----------------------------------------------------------------------------------------


def test_every_tool_has_a_probe():
    assert {requirement for probe in PROBES.values() for requirement in probe.requirements} == {*NAMED, "numpy<2.4"}
    assert {name for name, probe in PROBES.items() if not probe.requirements} == {"torch_itself", "torchvision"}


def test_what_needs_nothing_runs_in_this_interpreter(tmp_path):
    assert environments.install("torch", (), tmp_path) == environments.Path(sys.executable)
    assert list(tmp_path.iterdir()) == []


def test_an_environment_sees_this_interpreters_packages_and_is_used_again(tmp_path, monkeypatch):
    commands = []
    run = environments._run

    def only_venv(command, *rest):
        commands.append(command)
        return "" if "pip" in command else run(command, *rest)

    monkeypatch.setattr(environments, "_run", only_venv)
    python = environments.install("tool", ("some-tool",), tmp_path)
    assert run([str(python), "-c", "import torch, sys; print(torch.__version__, sys.prefix)"]).split() == [
        torch.__version__,
        str(tmp_path / "tool"),
    ]
    assert commands[-1][-1] == "some-tool"
    assert f"torch=={torch.__version__.partition('+')[0]}\n" in (tmp_path / "tool" / "pinned.txt").read_text()
    environments.install("tool", ("some-tool",), tmp_path)
    assert len(commands) == 2
    environments.install("tool", ("some-tool", "more"), tmp_path)
    assert len(commands) == 4


def test_a_tool_that_does_not_install_says_so(tmp_path, monkeypatch):
    def pip(command, *_):
        if "pip" in command:
            raise ToolError("ERROR: No matching distribution found for some-tool")
        (tmp_path / "thop" / "site-packages").mkdir(parents=True)

    monkeypatch.setattr(environments, "_run", pip)
    monkeypatch.setattr(command, "install", lambda name, needs: environments.install(name, needs, tmp_path))
    found = command.answer("thop")
    assert found == "does not install: ERROR: No matching distribution found for some-tool"
    assert "| thop | - | - | does not install: ERROR: No matching" in page.page(dict.fromkeys(PROBES, found))
    assert not (tmp_path / "thop" / "requirements.txt").exists()  # it is tried again the next time


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module that stands for the probes', from the code given."""

    def write(code):
        (tmp_path / "stand_in_probes.py").write_text(code)
        monkeypatch.setattr(environments, "ROOT", tmp_path)
        return "stand_in_probes"

    return write


def test_the_answer_is_the_marked_line_among_what_tools_print(module):
    answer = {"versions": "1.2", "rows": [["a call", "as it is", "1e-7"]], "machine": "a CPU"}
    code = f"import sys\nprint('noise'); print({environments.MARK + json.dumps(answer)!r}); print(sys.argv[1])"
    found = environments.ask("x", environments.Path(sys.executable), module(code))
    assert found == Answer("1.2", [Outcome("a call", "as it is", "1e-7")], "a CPU")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise ValueError('no such thing')", "^ValueError: no such thing$"),
        ("print('nothing to say')", "^the probe x ended without an answer$"),
        ("import os; os._exit(3)", r"ended with code 3$"),
    ],
)
def test_a_probe_that_ends_without_an_answer_is_one_line(module, code, message):
    with pytest.raises(ToolError, match=message):
        environments.ask("x", environments.Path(sys.executable), module(code))


# -- verdicts ----------------------------------------------------------------------------------------------------------


class Fusible(nn.Module):
    fused = False


@pytest.mark.parametrize(
    ("unfused", "fused", "verdict"),
    [(1e-6, 1e-6, "as it is"), (0.5, 1e-6, "fuse first"), (0.5, 0.5, "not"), (1e-6, 0.5, "as it is")],
)
def test_the_verdict_follows_from_what_was_measured(unfused, fused, verdict, monkeypatch):
    monkeypatch.setattr(probes.timm_nf, "fuse", lambda model: setattr(model, "fused", True) or model)
    row = probes.both("call", lambda model: probes.off(fused if model.fused else unfused), Fusible)
    assert row.verdict == verdict


def test_errors_of_a_tool_are_measured_and_cut():
    def broken(model):
        raise KeyError("a\nb" + "c" * 500)

    found = probes.attempt(broken, None)
    assert not found.ok
    assert len(found.text) < 180
    assert "\n" not in found.text


def test_numbers_are_written_as_errors_or_shares():
    assert probes.off(0) == Measured(True, "equal")
    assert probes.off(3e-7) == Measured(True, "3e-07")
    assert probes.off(0.56) == Measured(False, "56 % off")
    assert probes.share(1, 4, "multiply-adds") == Measured(False, "25 % of the multiply-adds")


def test_the_network_that_tools_get_shows_every_part():
    model, x = probes.network(), probes.images()
    assert all(p.abs().sum() > 0 for name, p in model.named_parameters() if name.endswith(("gain", "weight")))
    assert probes.error(model(x), probes.truth(model)) < 1e-5
    assert probes.multiply_adds() > 1e6


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_has_a_row_of_every_probe_and_our_words_around_it():
    text = (ROOT / "docs" / "tools.md").read_text()
    for probe in PROBES.values():
        assert f"\n| {probe.title} | " in text, f"run python -m scripts.check_tools again: no row of {probe.title}"
    fixed = [part.format() for part in re.split(r"(?<!\{)\{\w+\}", page.TEXT)]
    assert all(part in text for part in [*fixed, page.NOTES])
    verdicts = {line.split(" | ")[2] for line in text.splitlines() if line.startswith("| ") and "verdict" not in line}
    assert verdicts <= {"as it is", "fuse first", "not", "-", "---"}


def test_a_run_of_some_probes_keeps_the_rows_of_the_others(tmp_path):
    file = tmp_path / "tools.md"
    old = Answer(
        "1", [Outcome("a | b", "not", "old"), Outcome("c", "not", "old")], "timm_nf 0.1, an old machine, 1 thread"
    )
    page.write(dict.fromkeys(PROBES, old), file)
    page.write(
        {"thop": Answer("2", [Outcome("d", "as it is", "new")], "timm_nf 0.2, another machine, 2 threads")}, file
    )
    text = file.read_text()
    assert text.count(" | old | 1 |") == 2 * (len(PROBES) - 1)
    assert [line for line in text.splitlines() if line.startswith("| thop ")] == ["| thop | d | as it is | new | 2 |"]
    assert "- timm_nf 0.2, another machine, 2 threads: thop\n" in text
    (others,) = re.findall("^- timm_nf 0.1, an old machine, 1 thread: (.+)$", text, re.MULTILINE)
    assert set(others.split(", ")) == {probe.title for probe in PROBES.values()} - {"thop"}


# Each with the real tool.
MUST_WORK = ["torch_itself", "torchvision", "accelerate", "peft", "captum", "thop", "onnxsim"]


@pytest.mark.slow  # installs the tool
@pytest.mark.parametrize("name", MUST_WORK)
def test_the_tool_does_what_the_page_says(name, tmp_path):
    python = environments.install(name, PROBES[name].requirements, tmp_path)
    found = environments.ask(name, python)
    text = (ROOT / "docs" / "tools.md").read_text()
    for row in found.rows:
        assert f"| {PROBES[name].title} | {page.cell(row.what)} | {row.verdict} |" in text, row


@pytest.mark.slow  # installs PEFT and trains
@pytest.mark.parametrize("options", [[], ["--dora"]])
def test_adapters_on_a_fused_network_survive_saving_loading_and_merging(options, tmp_path):
    python = environments.install("peft", PROBES["peft"].requirements, tmp_path)
    script = [str(python), "-W", "ignore", str(ROOT / "examples" / "peft_lora.py"), "--steps", "8", "--images", "400"]
    variables = environments.os.environ | {"PYTHONPATH": str(ROOT)}
    printed = environments._run([*script, "--out", str(tmp_path / "adapter"), *options], variables)
    (error,) = re.findall(r"relative error (\S+),", printed)
    assert float(error) <= 1e-6  # the script's exit code says so too
    assert sorted(file.name for file in (tmp_path / "adapter").glob("adapter*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]

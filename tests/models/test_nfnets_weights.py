import copy
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm.models.nfnet  # timm's own networks, whose registry names ours replace
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.support import GOLDEN
from tests.support.saving import save_for_hf
from tests.support.small_nets import FAMILIES, NAMES, NETS, batch, build, create, keywords, relative_error, state_dict
from timm_nf.diagnostics import signal_stats
from timm_nf.models.nfnets import checkpoint_filter_fn
from timm_nf.variants import VARIANTS

EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES)


# --- pretrained weights and files ---


@contextmanager
def no_warnings_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        yield
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []


def config(name: str) -> dict[str, Any]:
    cfg = timm.get_pretrained_cfg(f"{name}.dm_in1k")
    assert cfg is not None
    return cfg.to_dict()


@pytest.mark.parametrize("name", [name for name, v in VARIANTS.items() if v.hf_hub_id])
def test_pretrained_config_is_that_of_timms_port(name: str) -> None:
    ours, timms = (config(n) for n in (name, f"dm_{name}"))
    same = ["hf_hub_id", "input_size", "test_input_size", "pool_size", "crop_pct", "crop_mode"]
    same += ["interpolation", "mean", "std", "num_classes"]
    assert {k: ours[k] for k in same} == {k: timms[k] for k in same} | {"hf_hub_id": f"timm/dm_{name}.dm_in1k"}
    assert ours["hf_hub_id"]
    assert (ours["first_conv"], ours["classifier"], ours["tag"]) == ("stem.conv1", "head.fc", "dm_in1k")
    assert ours["architecture"] == name


def test_seven_networks_have_weights_and_no_name_with_weights_was_taken_over() -> None:
    assert [name for name, v in VARIANTS.items() if v.hf_hub_id] == [f"nfnet_f{i}" for i in range(7)]
    assert config("dm_nfnet_f0")["architecture"] == "dm_nfnet_f0"
    assert type(timm.create_model("dm_nfnet_f0", device="meta")).__module__ == "timm.models.nfnet"
    assert type(timm.create_model("nf_resnet50", device="meta")).__module__ == "timm.models.nfnet"


def pretrained(family: str, overlay: dict[str, Any], **kwargs: Any) -> Any:
    overlay = {"num_classes": 10} | overlay
    return create(family, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


@EACH_FAMILY
@pytest.mark.parametrize("source", ["state_dict", "file", "safetensors"])
def test_pretrained_weights_load_from_a_dict_or_a_file(
    family: str, source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = state_dict(NETS[family], torch.float32)
    if source == "state_dict":
        overlay: dict[str, Any] = {"state_dict": state}
    elif source == "file":
        torch.save(state, tmp_path / "weights.pth")
        overlay = {"file": str(tmp_path / "weights.pth")}
    else:
        save_file(state, tmp_path / "model.safetensors")
        overlay = {"file": str(tmp_path / "model.safetensors")}
    with no_warnings_logged(caplog):
        model = pretrained(family, overlay)
    x = batch(dtype=torch.float32)
    assert torch.equal(model(x), build(family, torch.float32)(x))


@EACH_FAMILY
@pytest.mark.parametrize("num_classes", [0, 3])
def test_pretrained_weights_load_with_other_classes(
    family: str, num_classes: int, caplog: pytest.LogCaptureFixture
) -> None:
    with no_warnings_logged(caplog):
        model = pretrained(
            family, {"state_dict": state_dict(NETS[family])}, num_classes=num_classes, dtype=torch.float64
        )
    assert relative_error(model.forward_features(batch()), build(family).forward_features(batch())) < 1e-13
    assert model(batch()).shape == (2, num_classes or model.num_features)


@EACH_FAMILY
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_one_input_channel_keeps_the_function_for_grey_images(
    family: str, dtype: torch.dtype, tolerance: float, caplog: pytest.LogCaptureFixture
) -> None:
    state = state_dict(NETS[family], dtype)
    before = {k: v.clone() for k, v in state.items()}
    with no_warnings_logged(caplog):
        grey = pretrained(family, {"state_dict": state}, in_chans=1, dtype=dtype)
    x = batch(2, 97, 75)[:, :1]
    expected = build(family)(x.expand(-1, 3, -1, -1))
    assert relative_error(grey.double()(x), expected) < tolerance
    assert state.keys() == before.keys()
    assert all(torch.equal(state[k], v) for k, v in before.items())


def test_one_input_channel_keeps_the_function_where_stem_rows_lie_under_the_floor() -> None:
    state = state_dict(NETS["NFNet"])
    state["stem.conv1.weight"][:4] *= 1e-4
    state["stem.conv1.weight"][5] = 0.3
    state["stem.conv1.weight"][6, 1:] = -state["stem.conv1.weight"][6, :1] / 2  # the channels of a grey image cancel
    model = build("NFNet")
    model.load_state_dict(state)
    grey = pretrained("NFNet", {"state_dict": state}, in_chans=1, dtype=torch.float64)
    x = batch()[:, :1]
    assert relative_error(grey(x), model(x.expand(-1, 3, -1, -1))) < 1e-12


@EACH_FAMILY
def test_input_channels_in_multiples_of_three_keep_the_function_for_repeated_images(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    with no_warnings_logged(caplog):
        six = pretrained(family, {"state_dict": state_dict(NETS[family])}, in_chans=6, dtype=torch.float64)
    x = batch()
    assert relative_error(six(x.repeat(1, 2, 1, 1)), build(family)(x)) < 1e-12


@pytest.mark.parametrize("in_chans", [2, 4, 5])
def test_other_input_channels_load_all_but_the_mean_of_the_stem(
    in_chans: int, caplog: pytest.LogCaptureFixture
) -> None:
    with no_warnings_logged(caplog):
        model = pretrained("NFNet", {"state_dict": state_dict(NETS["NFNet"])}, in_chans=in_chans, dtype=torch.float64)
    original = build("NFNet").stem.conv1.effective_weight()
    expected = original.repeat(1, 2, 1, 1)[:, :in_chans] * 3 / in_chans
    expected -= expected.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(model.stem.conv1.effective_weight(), expected, rtol=0, atol=1e-13)


def test_features_only_loads_pretrained_weights_for_grey_images(caplog: pytest.LogCaptureFixture) -> None:
    with no_warnings_logged(caplog):
        overlay = {"state_dict": state_dict(NETS["NFNet"])}
        model = pretrained("NFNet", overlay, in_chans=1, features_only=True, dtype=torch.float64)
    x = batch()[:, :1]
    expected = build("NFNet").forward_intermediates(x.expand(-1, 3, -1, -1), intermediates_only=True)
    for a, b in zip(model(x), expected, strict=True):
        assert relative_error(a, b) < 1e-12


def stock(name: str) -> Any:
    """timm's own network with the widths of `create("NFNet", stem_chs=128)`."""
    kwargs = {
        "depths": (1, 2, 1, 1),
        "channels": (32, 64, 96, 96),
        "group_size": 8,
        "stem_chs": 128,
        "num_features": 192,
    }
    model = getattr(timm.models.nfnet, name)(num_classes=10, **kwargs)
    assert type(model).__module__ == "timm.models.nfnet"
    return model


@pytest.mark.parametrize("num_classes", [10, 3, 0])
@pytest.mark.parametrize("in_chans", [3, 1])
def test_weights_of_timms_own_nfnet_are_refused_and_the_message_says_where_they_belong(
    num_classes: int, in_chans: int, tmp_path: Path
) -> None:
    state = stock("nfnet_f0").state_dict()
    assert "stages.0.0.conv1.gain" in state
    match = r"timm's own nfnet_f.*timm\.models\.nfnet\.nfnet_f0"
    with pytest.raises(RuntimeError, match=match):
        pretrained("NFNet", {"state_dict": dict(state)}, num_classes=num_classes, in_chans=in_chans, stem_chs=128)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=match):
            create("NFNet", num_classes=num_classes, in_chans=in_chans, stem_chs=128).load_state_dict(
                state, strict=strict
            )
    torch.save(state, tmp_path / "stock.pth")
    if (num_classes, in_chans) == (10, 3):
        with pytest.raises(RuntimeError, match=match):
            create("NFNet", stem_chs=128, checkpoint_path=str(tmp_path / "stock.pth"))


def test_one_missing_skip_gain_is_enough_to_be_refused() -> None:
    state = state_dict(NETS["NFNet"])
    del state["stages.1.1.skipinit_gain"]
    with pytest.raises(RuntimeError, match=r"1 of 5 blocks \(stages\.1\.1"):
        create("NFNet").load_state_dict(state, strict=False)


def test_state_dict_of_timms_port_loads_unchanged() -> None:
    theirs = stock("dm_nfnet_f0")
    for module in theirs.modules():
        if hasattr(module, "skipinit_gain"):
            nn.init.constant_(module.skipinit_gain, 0.7)
    state = theirs.state_dict()
    assert state["stages.0.0.skipinit_gain"].shape == ()
    model = create("NFNet", stem_chs=128)
    model.load_state_dict(state, strict=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name].reshape(tensor.shape))
    # The same network up to timm's epsilon and gelu, a percent or two.
    x = batch(dtype=torch.float32)
    assert relative_error(model.eval().forward_features(x), theirs.eval().forward_features(x)) < 0.05


@EACH_FAMILY
def test_saved_folder_records_fused_and_reloads_to_equal_logits(family: str, tmp_path: Path) -> None:
    model = create(family)
    model.load_state_dict(state_dict(NETS[family], torch.float32))
    save_for_hf(model.eval(), str(tmp_path), safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_args"]["fused"] is False
    assert config["model_args"]["channels"] == list(NETS[family].channels)
    assert config["architecture"] == NAMES[family]
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    reloaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = batch(dtype=torch.float32)
    assert torch.equal(reloaded(x), model(x))
    grey = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=1, num_classes=0).eval()
    expected = model.forward_head(model.forward_features(x[:, :1].expand(-1, 3, -1, -1)), pre_logits=True)
    assert relative_error(grey(x[:, :1]), expected) < 2e-6


def test_stock_timm_stops_at_a_saved_folder(tmp_path: Path) -> None:
    save_for_hf(create("NFNet"), str(tmp_path), safe_serialization=True)
    code = f"import timm; timm.create_model('local-dir:{tmp_path}', pretrained=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "TypeError" in done.stderr
    assert "fused" in done.stderr


def test_fused_structure_has_plain_convolutions_without_gains() -> None:
    for family in FAMILIES:
        model = create(family, fused=True)
        names = create(family).state_dict().keys()
        assert model.state_dict().keys() == {n for n in names if not n.endswith(".gain")}
        assert model._model_args["fused"] is True
        assert model(batch(dtype=torch.float32)).shape == (2, 10)


def test_attention_can_be_left_out_through_create_model() -> None:
    model = timm.create_model("nfnet_f0", **(keywords(NETS["NFNet"]) | {"attn_layer": ""}))
    assert not [n for n, _ in model.named_parameters() if "attn" in n]


@pytest.mark.parametrize("training", [False, True])
def test_traces_with_stochastic_depth(training: bool) -> None:
    traced = torch.fx.symbolic_trace(build("NFNet", drop_path_rate=0.5).train(training))
    assert traced(batch(3)).shape == (3, 10)


@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing")  # torchvision: the head's dropout
def test_fx_features_take_any_batch_size_with_stochastic_depth() -> None:
    model = create("NFNet", features_only=True, feature_cls="fx", drop_path_rate=0.5)
    for n in (2, 3):
        assert len(model(batch(n, dtype=torch.float32))) == 5


def test_converting_the_stem_changes_neither_the_network_nor_the_callers_dict() -> None:
    model, state = create("NFNet", in_chans=1), state_dict(NETS["NFNet"])
    attributes, before = dict(vars(model)), dict(state)
    converted = checkpoint_filter_fn(state, model)
    assert converted["stem.conv1.weight"].shape[1] == 1
    assert vars(model) == attributes
    assert state == before
    assert model._traits["first_conv"] is None  # from the constructor on: timm leaves the stem alone


@pytest.mark.parametrize("fused", [False, True])
def test_weights_of_the_other_structure_are_refused_also_with_other_classes(fused: bool) -> None:
    other = create("NFNet", fused=not fused)
    overlay = {"num_classes": 10, "state_dict": other.state_dict()}
    for num_classes in (10, 3):
        with pytest.raises(RuntimeError, match=f"create it with fused={not fused}"):
            create("NFNet", fused=fused, num_classes=num_classes, pretrained=True, pretrained_cfg_overlay=overlay)


PARTS = {
    "biases": lambda name: name.endswith(".bias"),
    "gains": lambda name: name.endswith("gain"),
    "squeeze-excite": lambda name: ".attn" in name,
    "one convolution": lambda name: name.startswith("stages.1.1.conv2."),
    "one weight": lambda name: name == "stages.1.1.conv2.weight",
    "all but one convolution": lambda name: name != "stages.3.0.conv3.weight",
    "one stage": lambda name: name.startswith("stages.2."),
    "stem": lambda name: name.startswith("stem."),
}


@EACH_FAMILY
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_parts_of_a_network_load_as_torch_loads_them(family: str, fused: bool, prefix: str) -> None:
    for part, chosen in PARTS.items():
        model, source = create(family, fused=fused), create(family).state_dict()
        own = model.state_dict()
        state = {prefix + name: torch.full_like(p, 0.3) for name, p in source.items() if chosen(name)}
        outer = nn.ModuleDict({"model": model}) if prefix else model
        _, unexpected = outer.load_state_dict(state, strict=False)
        assert {name.removeprefix(prefix) for name in unexpected} == {n for n in source if chosen(n)} - own.keys(), part
        assert all((p == 0.3).all() == (prefix + name in state) for name, p in model.state_dict().items()), part


@EACH_FAMILY
def test_one_missing_gain_of_a_whole_network_is_enough_to_be_refused(family: str) -> None:
    state = create(family).state_dict()
    del state["stages.1.1.conv2.gain"]
    with pytest.raises(RuntimeError, match="from a fused network, but this network is unfused"):
        create(family).load_state_dict(state, strict=False)


@pytest.mark.parametrize("fused", [False, True])
def test_weights_of_the_other_structure_are_refused_for_features_and_under_a_prefix(fused: bool) -> None:
    state = create("NFNet", fused=not fused).state_dict()
    overlay = {"num_classes": 10, "state_dict": state}
    with pytest.raises(RuntimeError, match=f"create it with fused={not fused}"):
        create("NFNet", fused=fused, features_only=True, pretrained=True, pretrained_cfg_overlay=overlay)
    outer = nn.ModuleDict({"model": create("NFNet", fused=fused)})
    with pytest.raises(RuntimeError, match=f"create it with fused={not fused}"):
        outer.load_state_dict({f"model.{name}": p for name, p in state.items()}, strict=False)


@EACH_FAMILY
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "fx", "getter"])
def test_feature_extractors_refuse_other_networks_too_and_load_parts(
    family: str, fused: bool, feature_cls: str
) -> None:
    options = {"features_only": True, "feature_cls": feature_cls}
    model = copy.deepcopy(create(family, fused=fused, **options))
    own = model.state_dict()
    others = {
        "timm's own nfnet_f": {name: p for name, p in own.items() if not name.endswith(".skipinit_gain")},
        f"create it with fused={not fused}": create(family, fused=not fused, **options).state_dict(),
    }
    for prefix, outer in (("", model), ("0.", nn.Sequential(model))):
        for match, state in others.items():
            with pytest.raises(RuntimeError, match=match):
                outer.load_state_dict({prefix + name: p for name, p in state.items()}, strict=False)
        part = {prefix + name: torch.full_like(p, 0.3) for name, p in own.items() if name.endswith("bias")}
        assert outer.load_state_dict(part, strict=False).unexpected_keys == []
        assert all((outer.state_dict()[name] == 0.3).all() for name in part)


# --- the authors' files ---

T0 = {"depths": (1, 2, 1, 1), "channels": (32, 64, 96, 96), "group_size": 8, "num_classes": 10}


@pytest.mark.parametrize("form", ["plain", "flatmap", "jaxarrays"])
def test_authors_checkpoint_loads_through_create_model_to_the_golden_logits(
    form: str, caplog: pytest.LogCaptureFixture
) -> None:
    with no_warnings_logged(caplog), np.load(GOLDEN / "T0_2x64x64.npz") as golden:
        path = GOLDEN / f"T0_haiku_{form}.npz"
        model = timm.create_model("nfnet_f0", checkpoint_path=str(path), **T0).eval()
        assert relative_error(model(batch(dtype=torch.float32)), golden["logits"]) < 1e-5
        rows = signal_stats(model.double(), batch())
        assert relative_error(model(batch()), golden["logits"]) < 1e-13
        pool = model.forward_head(model.forward_features(batch()), pre_logits=True)
        assert relative_error(pool, golden["pool"]) < 1e-13
        got = {f"{key}_{i}": row[key] for i, row in enumerate(rows) for key in ("avg_sq_mean", "avg_var")}
        got |= {f"res_avg_var_{i}": row["res_avg_var"] for i, row in enumerate(rows[1:])}
        assert got.keys() == set(golden.files) - {"logits", "pool"}
        for key, value in got.items():
            assert value == pytest.approx(golden[key].item(), rel=1e-11), key


@pytest.mark.parametrize(
    "changes",
    [{"num_classes": 5}, {"in_chans": 1}, {"depths": (1, 1, 1, 1)}, {"channels": (32, 64, 96, 128)}, {"fused": True}],
    ids=lambda changes: next(iter(changes)),
)
def test_authors_checkpoint_of_another_network_is_refused_before_anything_is_assigned(changes: dict[str, Any]) -> None:
    model: Any = timm.create_model("nfnet_f0", **(T0 | changes))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    call = re.escape(f"timm.create_model('nfnet_f0', {', '.join(f'{k}={v!r}' for k, v in T0.items())})")
    with pytest.raises(
        ValueError, match=rf"T0_haiku_plain\.npz: expected the parameters of this network.*{call}, unfused$"
    ):
        model.load_pretrained(str(GOLDEN / "T0_haiku_plain.npz"))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_an_archive_of_numpy_is_refused_as_checkpoint(tmp_path: Path) -> None:
    np.savez(tmp_path / "weights.npz", w=np.ones(3))
    with pytest.raises(ValueError, match="the file is a zip archive"):
        create("NFNet", checkpoint_path=str(tmp_path / "weights.npz"))


@pytest.mark.parametrize("name", [f"nfnet_f{i}" for i in range(7)])
def test_names_and_shapes_are_those_of_timms_port_with_weights(name: str) -> None:
    ours, theirs = (timm.create_model(n, device="meta").state_dict() for n in (name, f"dm_{name}"))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape or (1,) for k, v in theirs.items()}

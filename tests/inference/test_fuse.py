"""Our networks fused: equal outputs, plain convolutions, timm's interface, saving and reloading."""

import copy
import io
import json
import pickle
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import timm_nf
from tests.support.saving import save_for_hf
from tests.support.small_nets import FAMILIES, NAMES, NETS, batch, build, create, keywords, relative_error, state_dict
from timm_nf.layers import GateConv2d, SameConv2d, ScaledStdConv2d
from timm_nf.layers.standardize import standardize_weight

EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# --- outputs ---


@EACH_FAMILY
@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 3), h=st.integers(8, 71), w=st.integers(8, 71))
def test_outputs_are_equal_at_any_size(family: str, n: int, h: int, w: int) -> None:
    model = build(family)
    fused, x = timm_nf.fuse(model), batch(n, h, w)
    with torch.no_grad():
        assert relative_error(fused(x), model(x)) < 1e-12
        assert relative_error(fused.forward_features(x), model.forward_features(x)) < 1e-12


@EACH_FAMILY
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_outputs_in_lower_precision_are_as_close_as_its_rounding(family: str, dtype: torch.dtype, bound: float) -> None:
    expected, fused = build(family)(batch()), timm_nf.fuse(build(family, dtype))
    assert {p.dtype for p in fused.parameters()} == {dtype}
    got = fused(batch(dtype=dtype))
    assert got.dtype is dtype
    assert relative_error(got.double(), expected) < bound


@EACH_FAMILY
@pytest.mark.parametrize(
    "kwargs", [{"output_stride": 8}, {"output_stride": 16}, {"in_chans": 1}, {"act_layer": "celu"}]
)
def test_outputs_of_other_settings_are_equal(family: str, kwargs: dict[str, Any]) -> None:
    model = create(family, **kwargs).double().eval()
    for name, p in model.named_parameters():
        if name.endswith(("gain", "bias")):
            nn.init.normal_(p, mean=0.5)
    x = batch(2, 65, 50)[:, : model.in_chans]
    assert relative_error(timm_nf.fuse(model)(x), model(x)) < 1e-12


def test_the_weight_is_the_standardised_one_with_gain_and_scale() -> None:
    conv = ScaledStdConv2d(6, 4, 3, groups=2, scale=1.7, dtype=torch.float64)
    nn.init.normal_(conv.gain)
    expected = 1.7 * standardize_weight(conv.weight, conv.gain)
    torch.testing.assert_close(timm_nf.fuse(conv).weight, expected, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(conv.fuse().weight, expected, rtol=1e-14, atol=1e-15)


# --- structure ---


@EACH_FAMILY
@pytest.mark.parametrize("output_stride", [32, 8])
def test_convolutions_are_plain_and_pad_themselves_only_where_padding_depends_on_the_size(
    family: str, output_stride: int
) -> None:
    fused = timm_nf.fuse(build(family, output_stride=output_stride))
    for conv in convolutions(fused):
        if type(conv) is not GateConv2d:  # of squeeze-excite, never standardised
            dynamic = conv.stride != (1, 1) and conv.kernel_size != (1, 1)
            assert type(conv) is (SameConv2d if dynamic else nn.Conv2d)
        assert dict(conv.named_parameters()).keys() == {"weight", "bias"}
    assert "gain" not in {n.rpartition(".")[2] for n in fused.state_dict()}


@pytest.mark.parametrize("name", ["nfnet_f0", "dm_nf_resnet50", "dm_nf_regnet_b0"])
def test_parameters_are_those_of_the_original_but_for_the_gains(name: str) -> None:
    model = timm.create_model(name, device="meta")
    gains = sum(p.numel() for n, p in model.named_parameters() if n.endswith(".gain"))
    assert parameters(timm_nf.fuse(model)) == parameters(model) - gains > 0.997 * parameters(model)


@EACH_FAMILY
def test_the_input_stays_as_it_was_and_shares_no_tensor(family: str) -> None:
    model = build(family, drop_rate=0.1)
    modules, before = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    fused = timm_nf.fuse(model)
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in fused.parameters()}
    with torch.no_grad():
        for p in fused.parameters():
            p.zero_()
    assert dict(model.named_modules()) == modules
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert (model.fused, fused.fused) == (False, True)
    assert (model._model_args["fused"], fused._model_args["fused"]) == (False, True)


def test_modes_gradients_and_memory_format_are_those_of_the_original() -> None:
    model = build("NFNet").to(memory_format=torch.channels_last).train()
    model.stem.eval().requires_grad_(False)
    fused = timm_nf.fuse(model)
    assert {n: m.training for n, m in fused.named_modules()} == {n: m.training for n, m in model.named_modules()}
    originals = dict(model.named_parameters())
    for name, p in fused.named_parameters():
        assert p.requires_grad == originals[name].requires_grad
        assert p.stride() == originals[name].stride()
    x = batch().to(memory_format=torch.channels_last)
    assert fused.forward_features(x).is_contiguous(memory_format=torch.channels_last)
    assert relative_error(fused(x), model(x)) < 1e-12


def test_a_layer_used_twice_stays_one_layer() -> None:
    conv = ScaledStdConv2d(4, 4, 3, dtype=torch.float64)
    model = nn.Sequential(conv, nn.ReLU(), conv)
    fused, x = timm_nf.fuse(model), torch.randn(1, 4, 5, 5, dtype=torch.float64)
    assert fused[0] is fused[2]
    assert relative_error(fused(x), model(x)) < 1e-12


# --- what is refused ---


@EACH_FAMILY
def test_fusing_twice_is_refused(family: str) -> None:
    for fused in (timm_nf.fuse(create(family)), create(family, fused=True)):
        with pytest.raises(ValueError, match=r"NormFreeNet .* fused already"):
            timm_nf.fuse(fused)


def test_a_network_without_standardised_convolutions_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no standardised convolution to fuse: expected an NFNet"):
        timm_nf.fuse(nn.Linear(2, 2))


@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing")  # torchvision: the head's dropout
def test_traced_graphs_hooks_and_unknown_layers_are_refused() -> None:
    for traced in (create("NFNet", features_only=True, feature_cls="fx"), torch.fx.symbolic_trace(create("NFNet"))):
        with pytest.raises(ValueError, match="fuse the model first, then trace it"):
            timm_nf.fuse(traced)
    model = create("NFNet")
    handle = model.stem.conv2.register_forward_hook(print)
    with pytest.raises(ValueError, match=r"stem\.conv2 has hooks"):
        timm_nf.fuse(model)
    handle.remove()
    nn.utils.parametrizations.weight_norm(model.stem.conv3)
    with pytest.raises(ValueError, match=r"stem\.conv3 is a Parametrized"):
        timm_nf.fuse(model)


# --- timm's interface ---


@EACH_FAMILY
def test_forward_intermediates_are_equal(family: str) -> None:
    model, x = build(family), batch(2, 49, 64)
    want, wants = model.forward_intermediates(x)
    got, gots = timm_nf.fuse(model).forward_intermediates(x)
    for a, b in zip([got, *gots], [want, *wants], strict=True):
        assert relative_error(a, b) < 1e-12


@EACH_FAMILY
@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing")  # torchvision: the head's dropout
@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "getter", "fx"])
def test_features_of_the_fused_structure_are_equal(family: str, feature_cls: str) -> None:
    model, x = build(family), batch()
    expected = model.forward_intermediates(x, intermediates_only=True)
    overlay = {"num_classes": 10, "state_dict": timm_nf.fuse(model).state_dict()}
    features = create(
        family,
        fused=True,
        features_only=True,
        feature_cls=feature_cls,
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        dtype=torch.float64,
    ).eval()
    got = features(x)
    for a, b in zip(got.values() if isinstance(got, dict) else got, expected, strict=True):
        assert relative_error(a, b) < 1e-12


@EACH_FAMILY
def test_a_feature_extractor_can_be_fused(family: str) -> None:
    features, x = create(family, features_only=True).double().eval(), batch()
    fused = timm_nf.fuse(features)
    assert fused.fused is True
    assert fused.feature_info.channels() == features.feature_info.channels()
    assert not [m for m in fused.modules() if isinstance(m, ScaledStdConv2d)]
    for a, b in zip(fused(x), features(x), strict=True):
        assert relative_error(a, b) < 1e-12
    with pytest.raises(ValueError, match="fused already"):
        timm_nf.fuse(fused)


@EACH_FAMILY
def test_the_classifier_can_be_replaced_and_the_network_pruned(family: str) -> None:
    fused, x = timm_nf.fuse(build(family)), batch()
    expected = fused.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
    fused.reset_classifier(3)
    assert fused(x).shape == (2, 3)
    fused.prune_intermediate_layers([1])
    assert fused.fused is True
    assert torch.equal(fused.forward_intermediates(x, intermediates_only=True)[-1], expected)


@EACH_FAMILY
def test_timms_reparameterize_model_fuses_ours(family: str) -> None:
    model, x = build(family), batch(2, 47, 64)
    fused = timm.utils.reparameterize_model(model)
    assert (model.fused, fused.fused, fused._model_args["fused"]) == (False, True, True)
    assert relative_error(fused(x), model(x)) < 1e-12
    want = timm_nf.fuse(model).state_dict()
    assert fused.state_dict().keys() == want.keys()
    assert all(torch.equal(v, want[k]) for k, v in fused.state_dict().items())


# --- saving ---


@EACH_FAMILY
@pytest.mark.parametrize("fuse", [timm_nf.fuse, timm.utils.reparameterize_model], ids=["fuse", "reparameterize_model"])
def test_state_dict_loads_strictly_into_the_fused_structure(family: str, fuse: Any) -> None:
    model, x = build(family), batch()
    other = create(family, fused=True).double().eval()
    assert other._model_args["fused"] is True
    other.load_state_dict(fuse(model).state_dict(), strict=True)
    assert relative_error(other(x), model(x)) < 1e-12


@EACH_FAMILY
def test_the_fused_structure_starts_as_the_network_it_stands_for(family: str) -> None:
    models = []
    for fused in (False, True):
        torch.manual_seed(0)
        models.append(create(family, fused=fused).eval())
    nn.init.normal_(models[0].head.fc.weight)
    models[1].head.load_state_dict(models[0].head.state_dict())
    x = batch(dtype=torch.float32)
    assert relative_error(models[1](x), models[0](x)) < 1e-6


@EACH_FAMILY
def test_a_saved_folder_is_of_the_same_architecture_and_reloads_to_equal_logits(family: str, tmp_path: Any) -> None:
    model = create(family)
    model.load_state_dict(state_dict(NETS[family], torch.float32))
    fused, x = timm_nf.fuse(model.eval()), batch(dtype=torch.float32)
    save_for_hf(fused, str(tmp_path), safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == NAMES[family]
    assert config["model_args"]["fused"] is True
    assert config["model_args"]["channels"] == list(NETS[family].channels)
    assert load_file(tmp_path / "model.safetensors").keys() == fused.state_dict().keys()
    reloaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert reloaded.fused is True
    assert torch.equal(reloaded(x), fused(x))
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0, in_chans=1).eval()
    expected = fused.forward_head(fused.forward_features(x[:, :1].expand(-1, 3, -1, -1)), pre_logits=True)
    assert relative_error(other(x[:, :1]), expected) < 2e-6


@EACH_FAMILY
def test_pickles_and_deep_copies(family: str) -> None:
    fused, x = timm_nf.fuse(build(family)), batch()
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    copies = [pickle.loads(pickle.dumps(fused)), copy.deepcopy(fused), torch.load(buffer, weights_only=False)]
    for other in copies:
        assert other.fused is True
        assert torch.equal(other(x), fused(x))


# --- training ---


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    model(x).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@EACH_FAMILY
def test_in_training_mode_dropout_and_stochastic_depth_act_as_before(family: str) -> None:
    model, x = build(family, drop_rate=0.5, drop_path_rate=0.5).train(), batch(4)
    fused = timm_nf.fuse(model)
    outputs = []
    for network in (model, fused):
        torch.manual_seed(3)
        outputs.append(network(x))
    assert relative_error(outputs[1], outputs[0]) < 1e-12
    assert relative_error(fused(x), outputs[1]) > 0.01  # other draws
    fused.eval()
    assert torch.equal(fused(x), fused(x))


@EACH_FAMILY
def test_a_fused_network_trains_as_plain_convolutions(family: str) -> None:
    model, x = build(family), batch()
    fused = timm_nf.fuse(model)
    want, got = gradients(model, x), gradients(fused, x)
    assert got.keys() == dict(fused.named_parameters()).keys()
    for name, g in got.items():  # whatever was not standardised has the gradients it had
        if not name.endswith(".weight") or name.startswith("head.") or ".fc" in name:
            torch.testing.assert_close(g, want[name], rtol=1e-9, atol=1e-11)
    assert fused.no_weight_decay() == {n for n in got if n.endswith("skipinit_gain")}
    before = fused(x).square().sum()
    optimizer = timm.optim.create_optimizer_v2(fused, "agcsgd", lr=1e-3, weight_decay=0.0, clip_factor=0.01)
    optimizer.step()
    assert fused(x).square().sum() < before


def test_fused_and_other_keywords_go_together() -> None:
    kwargs = keywords(NETS["NFNet"]) | {"drop_rate": 0.2, "output_stride": 16, "num_classes": 3}
    model = timm.create_model("nfnet_f0", fused=True, **kwargs)
    assert model._model_args == kwargs | {"fused": True}

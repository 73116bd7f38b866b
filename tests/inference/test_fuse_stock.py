"""timm's own networks fused, each with the formula of its layer."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn

import timm_nf
from tests.support.saving import save_for_hf
from tests.support.small_nets import relative_error

LAYERS = {cls.__name__: cls for cls in (ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame)}
NFNET = {"depths": (1, 1), "channels": (32, 48)}
VIT = {"img_size": 64, "embed_dim": 48, "depth": 1, "num_heads": 3}
NETS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "nf_resnet50": (ScaledStdConv2d, NFNET),
    "nf_ecaresnet26": (ScaledStdConv2d, NFNET),
    "eca_nfnet_l0": (ScaledStdConv2d, NFNET | {"group_size": 8}),
    "nf_regnet_b1": (ScaledStdConv2d, NFNET),
    "dm_nfnet_f0": (ScaledStdConv2dSame, NFNET | {"group_size": 8}),
    "vit_tiny_r_s16_p8_224": (StdConv2dSame, VIT),
    "vit_small_r26_s32_224": (StdConv2dSame, VIT),
    "vit_base_r50_s16_224": (StdConv2dSame, VIT),
}


def randomised(model: nn.Module, seed: int = 0) -> Any:
    """In float64, with every gain, skip gain, bias and scale away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    for name, p in model.named_parameters():
        with torch.no_grad():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + 0.5 * name.endswith(("gain", "norm.weight")))
    return model


def stock(name: str, **kwargs: Any) -> Any:
    return randomised(timm.create_model(name, num_classes=5, **NETS[name][1] | kwargs))


def small_bit() -> Any:
    # timm's entrypoints fix the depths; this is resnetv2_50x1_bit with fewer
    conv = partial(StdConv2d, eps=1e-8)
    return randomised(ResNetV2((1, 2), (128, 256), num_classes=5, stem_chs=32, stem_type="fixed", conv_layer=conv))


def batch(h: int = 64, w: int = 64) -> Tensor:
    return torch.randn(2, 3, h, w, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def standardised(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, tuple(LAYERS.values()))]


def assert_fuses(model: Any, layer: type[nn.Module], *inputs: Tensor) -> Any:
    assert {type(m) for m in standardised(model)} == {layer}
    fused = timm_nf.fuse(model)
    assert not standardised(fused)
    for x in inputs:
        with torch.no_grad():
            assert relative_error(fused(x), model(x)) < 1e-12
    return fused


@pytest.mark.parametrize("name", NETS)
def test_outputs_are_equal(name: str) -> None:
    model = stock(name)
    sizes = [(64, 64)] if name.startswith("vit") else [(64, 64), (51, 70), (33, 47)]
    fused = assert_fuses(model, NETS[name][0], *(batch(*size) for size in sizes))
    gains = sum(p.numel() for n, p in model.named_parameters() if n.endswith(".gain"))
    assert sum(p.numel() for p in fused.parameters()) == sum(p.numel() for p in model.parameters()) - gains
    x = batch().float()
    assert relative_error(timm_nf.fuse(model.float())(x), model(x)) < 1e-5


def test_outputs_of_bit_are_equal() -> None:
    assert_fuses(small_bit(), StdConv2d, batch(), batch(51, 70))


@pytest.mark.parametrize("name", ["nf_resnet50", "dm_nfnet_f0"])
@pytest.mark.parametrize("output_stride", [8, 16])
def test_outputs_with_dilation_are_equal(name: str, output_stride: int) -> None:
    channels = {"depths": (1, 1, 2, 2), "channels": (32, 48, 64, 64)}
    model = stock(name, output_stride=output_stride, **channels)
    assert any(m.dilation != (1, 1) for m in standardised(model))
    assert_fuses(model, NETS[name][0], batch(), batch(51, 70))


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=60, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    bias=st.booleans(),
    eps=st.sampled_from([1e-8, 1e-3]),
    padding=st.sampled_from(["", "valid", "same"]),
    size=st.tuples(st.integers(11, 16), st.integers(11, 16)),
)
def test_layers_of_any_shape_keep_their_own_formula_and_padding(
    name: str, kernel: Any, stride: int, dilation: int, groups: int, bias: bool, eps: float, padding: str, size: Any
) -> None:
    # only the SAME forms take padding by name
    extra = {"padding": padding} if name.endswith("Same") else {"padding": {"": None, "valid": 0, "same": 1}[padding]}
    if name.startswith("Scaled"):
        extra |= {"gamma": 1.7, "gain_init": 0.6}
    conv = LAYERS[name](4, 6, kernel, stride=stride, dilation=dilation, groups=groups, bias=bias, eps=eps, **extra)
    assume(conv.weight[0].numel() > 1)  # timm cannot standardise one number
    conv, x = conv.double(), torch.randn(2, 4, *size, dtype=torch.float64)
    fused = timm_nf.fuse(conv)
    static = kernel == (1, 1) or (stride == 1 and all(dilation * (k - 1) % 2 == 0 for k in kernel))
    assert (type(fused) is nn.Conv2d) == (static or padding != "same" or not name.endswith("Same"))
    torch.testing.assert_close(fused(x), conv(x), rtol=1e-12, atol=1e-13)


def test_features_and_bare_modules_can_be_fused() -> None:
    features = timm.create_model("dm_nfnet_f0", features_only=True, out_indices=(0, 1, 2), **NETS["dm_nfnet_f0"][1])
    features = randomised(features)
    for a, b in zip(timm_nf.fuse(features)(batch()), features(batch()), strict=True):
        assert relative_error(a, b) < 1e-12
    wrapped = nn.Sequential(nn.Hardtanh(), stock("nf_resnet50"))
    fused = timm_nf.fuse(wrapped)
    assert relative_error(fused(batch()), wrapped(batch())) < 1e-12
    assert fused.fused is True


def test_fusing_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"NormFreeNet .* fused already"):
        timm_nf.fuse(timm_nf.fuse(stock("nf_resnet50")))
    with pytest.raises(ValueError, match="ResNet has no standardised convolution to fuse: expected"):
        timm_nf.fuse(timm.create_model("test_resnet"))


def test_a_saved_folder_says_fused_and_stops_timm(tmp_path: Path) -> None:
    model = timm.create_model("nf_resnet50", num_classes=5, **NFNET)
    fused = timm_nf.fuse(model)
    assert fused.fused is True
    assert fused._model_args == getattr(model, "_model_args", {}) | {"fused": True}
    assert not hasattr(model, "fused")
    save_for_hf(fused, str(tmp_path), safe_serialization=True)
    assert json.loads((tmp_path / "config.json").read_text())["model_args"]["fused"] is True
    code = f"import timm; timm.create_model('local-dir:{tmp_path}', pretrained=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "TypeError" in done.stderr
    assert "fused" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("module", ["nfnet", "resnetv2", "vision_transformer_hybrid"])
def test_every_registered_network_with_such_layers_fuses(module: str) -> None:
    fused = 0
    for name in timm.list_models(module=module):
        model = timm.create_model(name, device="meta")
        if standardised(model):
            assert not standardised(timm_nf.fuse(model)), name
            fused += 1
    assert fused >= 6

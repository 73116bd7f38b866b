"""Other people's networks without normalisation: what is converted to what, and what is refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

import timm_nf
from tests.support.saving import save_for_hf
from tests.support.small_nets import relative_error
from timm_nf import layers
from timm_nf.diagnostics import signal_stats
from timm_nf.diagnostics.inputs import open_branches
from timm_nf.models.normalizer_free import ResidualBlock

NETWORKS: dict[str, Callable[[], Any]] = {
    "torchvision resnet18": torchvision.models.resnet18,
    "torchvision resnet50": torchvision.models.resnet50,
    "torchvision regnet_y_400mf": torchvision.models.regnet_y_400mf,
    "timm resnet18": lambda: timm.create_model("resnet18"),
    "timm resnet50": lambda: timm.create_model("resnet50", drop_path_rate=0.1),
    "timm regnety_004": lambda: timm.create_model("regnety_004"),
    "timm resnetv2_18": lambda: timm.create_model("resnetv2_18"),
}


class Block(nn.Module):
    """A residual block of nobody's, with a functional activation inside."""

    def __init__(self, conv: Any, norm: Any, chs: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(chs, chs, 3, padding=1, bias=False), norm(chs)
        self.conv2, self.norm2 = conv(chs, chs, 3, padding=1, bias=False), norm(chs)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.norm1(self.conv1(x)))
        return self.act(x + self.norm2(self.conv2(out)))


def own_network(axes: int) -> nn.Module:
    conv, norm = getattr(nn, f"Conv{axes}d"), getattr(nn, f"BatchNorm{axes}d")
    pool = getattr(nn, f"AdaptiveAvgPool{axes}d")(1)
    stem = conv(2, 64, 3, padding=1), norm(64), nn.SiLU()
    return nn.Sequential(*stem, Block(conv, norm, 64), Block(conv, norm, 64), pool, nn.Flatten(), nn.Linear(64, 3))


def norms(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if "Norm" in type(m).__name__ and not isinstance(m, nn.Identity)]


# --- the variance ---


def without_borders(model: nn.Module) -> nn.Module:
    """The same network with circular padding: behind zeros a border has less variance than the rest."""
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            sizes = m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding, m.dilation, m.groups
            m.__init__(*sizes, m.bias is not None, "circular")
    return model


def deviations(build: Callable[[], nn.Module], images: tuple[int, ...], draws: int) -> dict[str, float]:
    """Measured by analytic variance behind each block, minus 1, in the mean of several draws of the weights."""
    total: dict[str, float] = {}
    for seed in range(draws):
        torch.manual_seed(seed)
        network = timm_nf.normalizer_free(build())
        open_branches(network)
        rows = signal_stats(network, torch.randn(images))
        assert len(rows) == 1 + sum(isinstance(m, ResidualBlock) for m in network.modules())
        for row in rows[1:]:
            total[row["name"]] = total.get(row["name"], 0.0) + (row["avg_var"] / row["expected_var"] - 1) / draws
    return total


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_signals_at_initialisation_follow_the_analytic_variance(name: str) -> None:
    found = deviations(lambda: without_borders(NETWORKS[name]()), (4, 3, 128, 128), draws=3)
    # The gate of squeeze-excite has a variance of its own, which every block adds.
    assert max(map(abs, found.values())) < (0.1 if "regnet" in name else 0.05), found


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_zeros_around_a_picture_take_variance_from_small_feature_maps(name: str) -> None:
    found = deviations(NETWORKS[name], (4, 3, 224, 224), draws=1)
    *_, last = found.values()
    assert -0.15 < last < 0, found
    assert max(map(abs, found.values())) < 0.15, found


@pytest.fixture(scope="module")
def resnet18() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    return model, timm_nf.normalizer_free(model)


def test_signals_of_a_resnet18_follow_the_analytic_variance_which_grows_by_alpha_squared(resnet18: Any) -> None:
    network = copy.deepcopy(resnet18[1])
    assert open_branches(network) == 8
    rows = signal_stats(network, torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)))
    # The largest of 9 unit normal numbers has a variance of 0.357, which the shortcuts of the first stage keep.
    expected = [0.357 + 0.04, 0.357 + 0.08, 1.04, 1.08, 1.04, 1.08, 1.04, 1.08]
    assert [row["expected_var"] for row in rows[1:]] == pytest.approx(expected, abs=1e-3)
    for row in rows[1:]:
        assert row["avg_var"] == pytest.approx(row["expected_var"], rel=0.12), row["name"]


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_network_of_ones_own_is_followed_in_every_dimension(axes: int) -> None:
    torch.manual_seed(0)
    model = own_network(axes)
    network = timm_nf.normalizer_free(model)
    assert not norms(network)
    open_branches(network)
    rows = signal_stats(network, torch.randn(4, 2, *[12] * axes))
    assert [row["expected_var"] for row in rows[1:]] == pytest.approx([1.04, 1.08])
    assert [row["avg_var"] for row in rows[1:]] == pytest.approx([1.04, 1.08], rel=0.2)
    assert network(torch.randn(2, 2, *[9] * axes)).shape == (2, 3)


# --- structure ---


def test_nothing_normalises_and_every_convolution_is_standardised(resnet18: Any) -> None:
    model, network = resnet18
    assert not norms(network)
    convs = {n: m for n, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    assert {type(m) for m in convs.values()} == {layers.ScaledStdConv2d}
    assert len(convs) == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert torch.equal(convs["conv1"].weight, model.conv1.weight)
    assert [m.skip.gain.item() for m in network.modules() if isinstance(m, ResidualBlock)] == [0.0] * 8


def test_the_given_network_is_left_as_it_is_and_shares_nothing() -> None:
    model = torchvision.models.resnet18(num_classes=4)
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    network = timm_nf.normalizer_free(model)
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert dict(model.named_modules()) == modules
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in network.parameters()}


def test_blocks_equal_the_papers_formula_written_out(resnet18: Any) -> None:
    network = copy.deepcopy(resnet18[1]).double().eval()
    block: Any = network.layer2[0]
    for p in (block.skip.gain, block.branch.conv1.bias, block.branch.conv2.gain):
        nn.init.normal_(p)
    gamma = layers.activation_gain("relu")
    beta = gamma / block.branch.conv1.scale  # of two blocks behind a max pooling, see below
    x = torch.randn(2, 64, 12, 12, dtype=torch.float64)

    def conv(layer: Any, y: Tensor) -> Tensor:
        weight = layers.standardize_weight(layer.weight, layer.gain)
        return nn.functional.conv2d(y, weight, layer.bias, layer.stride, layer.padding)

    out = gamma * x.relu() / beta
    shortcut = conv(block.shortcut[0], out)
    branch = conv(block.branch.conv2, gamma * conv(block.branch.conv1, out).relu())
    expected = shortcut + 0.2 * block.skip.gain * branch
    assert relative_error(block(x), expected) < 1e-12


def hand_built(model: Any, betas: list[float], x: Tensor) -> Tensor:
    """timm's resnetv2_18 without its normalisation, written out, with skip gains of 1."""
    gamma, divisors = layers.activation_gain("relu"), iter(betas)

    def conv(layer: Any, y: Tensor) -> Tensor:
        weight = layers.standardize_weight(layer.weight, torch.ones(len(layer.weight), 1, 1, 1).double())
        return nn.functional.conv2d(y, weight, None, layer.stride, layer.padding)

    x = model.stem.pool(conv(model.stem.conv, x))
    for stage in model.stages:
        for block in stage.blocks:
            out = gamma * x.relu() / next(divisors)
            shortcut = x if block.downsample is None else conv(block.downsample.conv, out)
            x = shortcut + 0.2 * conv(block.conv2, gamma * conv(block.conv1, out).relu())
    return model.head(gamma * x.relu() / next(divisors))


def test_a_pre_activation_network_equals_one_built_by_hand() -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnetv2_18", num_classes=5).double().eval()
    network: Any = timm_nf.normalizer_free(model).eval()
    open_branches(network)
    gamma = layers.activation_gain("relu")
    scales = [m.branch.conv1.scale for m in network.modules() if isinstance(m, ResidualBlock)]
    generator = torch.Generator().manual_seed(0)
    for k in range(3):  # by drawing: the largest of 9 normal numbers, and k branches of variance 0.04
        largest = torch.randn(400_000, 9, generator=generator).amax(1)
        x = largest + 0.2 * torch.randn(400_000, k, generator=generator).sum(1)
        assert scales[k] == pytest.approx(1 / x.relu().std().item(), rel=5e-3)
    assert scales[3:] == pytest.approx([gamma / b**0.5 for b in (1.04, 1.08, 1.04, 1.08, 1.04)])
    betas = [*(gamma / scale for scale in scales), 1.08**0.5]
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert relative_error(network(x), hand_built(model, betas, x)) < 1e-12
    assert not any(isinstance(m, BatchNormAct2d) for m in network.modules())


def test_timms_interface_stays() -> None:
    network: Any = timm_nf.normalizer_free(timm.create_model("resnet18", drop_path_rate=0.2))
    assert network.forward_features(torch.randn(1, 3, 64, 64)).shape == (1, 512, 2, 2)
    network.reset_classifier(7)
    assert network(torch.randn(1, 3, 64, 64)).shape == (1, 7)
    rates = [m.skip.drop_path.rate for m in network.modules() if isinstance(m, ResidualBlock) and m.skip.drop_path]
    assert rates == pytest.approx([0.2 * i / 7 for i in range(1, 8)])


@pytest.mark.parametrize("name", ["test_resnet", "resnetv2_18"])
def test_stock_timm_does_not_load_the_weights(name: str, tmp_path: Path) -> None:
    network: Any = timm_nf.normalizer_free(timm.create_model(name))
    save_for_hf(network, tmp_path / "net")
    with pytest.raises(TypeError, match="normalizer_free"):
        timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True)
    with pytest.raises(ValueError, match=r"could not be loaded again \(TypeError.* 'normalizer_free'\)"):
        timm_nf.hub.write_folder(network, tmp_path / "ours", card=None)


@pytest.mark.parametrize("name", ["seresnet18", "resnetv2_18d", "regnety_002"])
def test_no_activation_overwrites_what_a_layer_gave(name: str) -> None:
    network = timm_nf.normalizer_free(timm.create_model(name)).eval()
    given: dict[str, tuple[Tensor, Tensor]] = {}
    for path, module in network.named_modules():
        module.register_forward_hook(lambda _, args, out, path=path: given.update({path: (out, out.clone())}))
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            network(torch.randn(1, 3, 32, 32))
        assert given
        assert [path for path, (out, copy_) in given.items() if not torch.equal(out, copy_)] == []


def test_squeeze_excite_counts_twice() -> None:
    network = timm_nf.normalizer_free(timm.create_model("seresnet18"))
    assert {m.skip.alpha for m in network.modules() if isinstance(m, ResidualBlock)} == {
        0.4
    }  # a gate behind the branch
    network = timm_nf.normalizer_free(timm.create_model("regnety_002"))
    block: Any = next(m for m in network.modules() if isinstance(m, ResidualBlock))
    assert block.branch.conv3_conv.scale == pytest.approx(2 * layers.activation_gain("relu")) or block.skip.alpha == 0.2


def test_convolutions_alone_are_converted_too_and_the_last_activation_carries_its_gamma() -> None:
    features = nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.GELU(), nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64), nn.ReLU()
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2)
    network: Any = timm_nf.normalizer_free(nn.Sequential(*features, *head))
    assert (network[0].scale, network[3].scale) == (1.0, layers.activation_gain("gelu"))
    assert isinstance(network[5], layers.Activation)
    assert network[5].gain == layers.activation_gain("relu")


# --- what other parts of the package do with it ---


def test_it_is_clipped_decayed_fused_and_exported_as_the_zoo_is(resnet18: Any) -> None:
    network = resnet18[1].eval()
    groups = timm_nf.param_groups_agc(network, weight_decay=0.1, clip_exempt=("fc",))
    decays = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    for name, p in network.named_parameters():
        assert decays[id(p)] == (0.1 if name.endswith("weight") else 0.0), name
    fused, x = timm_nf.fuse(network), torch.randn(2, 3, 48, 48)
    assert {type(m) for m in fused.modules() if isinstance(m, nn.Conv2d)} == {nn.Conv2d}
    with torch.no_grad():
        assert relative_error(fused(x), network(x)) < 1e-5
        exported = torch.export.export(fused, (x,)).module()
        assert relative_error(exported(x), network(x)) < 1e-5


@pytest.mark.slow
def test_it_trains_with_agcsgd_on_the_demos_digits() -> None:
    from timm_nf.demo import MEAN, STD, load_digits

    torch.manual_seed(0)
    network = timm_nf.normalizer_free(timm.create_model("resnet18d", in_chans=1, num_classes=10))
    pixels, labels = load_digits()
    order = torch.randperm(len(labels))[:1000]
    x, y = (pixels[order].float() / 255 - MEAN) / STD, labels[order]
    optimizer = timm.optim.create_optimizer_v2(network, "agcsgd", lr=0.1, momentum=0.9, weight_decay=2e-5)
    network.train()
    for _ in range(4):
        for batch in torch.randperm(800).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[batch]), y[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        accuracy = (network.eval()(x[800:]).argmax(1) == y[800:]).float().mean().item()
    assert accuracy > 0.8


# --- replace_convs ---


def test_replace_convs_swaps_layers_and_nothing_else() -> None:
    model = timm.create_model("resnet18", num_classes=3).double().eval()
    swapped: Any = timm_nf.replace_convs(model)
    assert norms(swapped) == norms(model)
    assert dict(swapped.named_modules()).keys() == dict(model.named_modules()).keys()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.copy_(
                    layers.standardize_weight(module.weight, torch.ones(len(module.weight), 1, 1, 1).double())
                )
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    assert relative_error(swapped(x), model(x)) < 1e-12


def test_replace_convs_knows_transposed_layers_and_spares_the_classifier() -> None:
    model = nn.Sequential(
        nn.ConvTranspose1d(4, 6, 3, 2, 1, output_padding=1, groups=2), nn.Conv3d(2, 2, 1, device="meta")
    )
    swapped = timm_nf.replace_convs(model)
    assert [type(m) for m in swapped] == [layers.ScaledStdConvTranspose1d, layers.ScaledStdConv3d]
    assert swapped[0](torch.zeros(1, 4, 5)).shape == model[0](torch.zeros(1, 4, 5)).shape
    head = timm.create_model("resnetv2_18", num_classes=3)  # whose classifier is a convolution
    assert type(timm_nf.replace_convs(head).get_classifier()) is nn.Conv2d
    with pytest.raises(ValueError, match="no convolution to replace"):
        timm_nf.replace_convs(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"0 has a fan-in of 1"):
        timm_nf.replace_convs(nn.Sequential(nn.Conv1d(4, 4, 1, groups=4)))


class Renamed(nn.Conv2d):
    def extra_repr(self) -> str:
        return "a convolution"


class Doubled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_subclasses_that_compute_as_torchs_layer_are_convolutions_and_others_are_refused() -> None:
    assert type(timm_nf.replace_convs(nn.Sequential(Renamed(3, 4, 3)))[0]) is layers.ScaledStdConv2d
    weight_norm = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    for conv in (Doubled(3, 4, 3), weight_norm):
        model = nn.Sequential(nn.Conv2d(3, 3, 3), conv, nn.BatchNorm2d(4))
        with pytest.raises(ValueError, match=rf"1 is a {type(conv).__name__}, which computes"):
            timm_nf.replace_convs(model)
        with pytest.raises(ValueError, match="2 stands behind"):
            timm_nf.normalizer_free(model)


def test_networks_for_video_convert() -> None:
    model = timm_nf.normalizer_free(torchvision.models.video.r3d_18(num_classes=4))
    assert not any(isinstance(m, nn.BatchNorm3d) or type(m) is nn.Conv3d for m in model.modules())
    assert model(torch.zeros(1, 3, 4, 32, 32)).shape == (1, 4)


def test_layers_that_are_standardised_already_stay() -> None:
    ours, timms = layers.ScaledStdConv2d(3, 3, 3), timm.layers.ScaledStdConv2d(3, 3, 3)
    swapped = timm_nf.replace_convs(nn.Sequential(ours, timms, nn.Conv2d(3, 3, 3)))
    assert [type(m) for m in swapped] == [type(ours), type(timms), type(ours)]


# --- what is refused ---


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + x


class Depends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 3)), "has no normalisation to do without"),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.PReLU(), nn.Conv2d(8, 8, 3)), r"2 \(PReLU\)"),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8)), "1 is a InstanceNorm2d: expected batch"),
        (lambda: timm.create_model("resnetblur18"), r"layer1.* stands behind maxpool.1 \(BlurPool2d\)"),
        (lambda: torchvision.models.densenet121(), "stands behind cat"),
        (lambda: timm.create_model("convnext_atto"), "is a LayerNorm2d"),
        (lambda: timm.create_model("vit_tiny_patch16_224"), "residual addition"),
        (lambda: timm.create_model("botnet26t_256"), r"stages.2.1 has 2 residual additions: expected one"),
        (lambda: Twice(), "the forward of Twice itself has 1 residual additions"),
        (lambda: Depends(), "Depends cannot be followed"),
    ],
)
def test_what_cannot_be_converted_is_named(build: Callable[[], nn.Module], match: str) -> None:
    model = build()
    before = {name: type(m) for name, m in model.named_modules()}
    with pytest.raises(ValueError, match=match):
        timm_nf.normalizer_free(model)
    assert {name: type(m) for name, m in model.named_modules()} == before


def test_hooks_are_not_lost_in_silence() -> None:
    model = torchvision.models.resnet18()
    model.layer1[0].conv1.register_forward_hook(print)
    with pytest.raises(ValueError, match=r"layer1\.0.* has hooks"):
        timm_nf.normalizer_free(model)
    with pytest.raises(ValueError, match=r"layer1\.0\.conv1 has hooks"):
        timm_nf.replace_convs(model)

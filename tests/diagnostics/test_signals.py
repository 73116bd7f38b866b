"""`timm_nf.diagnostics`: any network of timm; that ours give the authors' numbers is held in test_golden.py."""

import copy
import math

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tests.support.small_nets import create
from timm_nf.diagnostics import agc_stats, signal_stats
from timm_nf.diagnostics.inputs import open_branches
from timm_nf.optim.agc import adaptive_clip_grad_, unitwise_norm

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def after_backward(skip_gain):
    torch.manual_seed(0)
    model = create("NFNet")
    for name, p in model.named_parameters():
        if name.endswith("skipinit_gain"):
            nn.init.constant_(p, skip_gain)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    return model


def test_rows_are_what_clipping_would_do_and_nothing_is_changed():
    model = after_backward(0.5)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    rows = agc_stats(model, clip_factor=0.05)
    assert [row["name"] for row in rows] == list(gradients)
    for row, (name, p) in zip(rows, model.named_parameters(), strict=True):
        assert torch.equal(p.grad, gradients[name])
        ratio = (unitwise_norm(p.grad) / unitwise_norm(p.detach()).clamp(min=1e-3)).flatten()
        assert row["units"] == ratio.numel()
        assert list(row["ratio_quantiles"]) == list(QUANTILES)
        assert list(row["ratio_quantiles"].values()) == pytest.approx(ratio.quantile(torch.tensor(QUANTILES)).tolist())
        expected = 0 if name == "head.fc.weight" else adaptive_clip_grad_(p, 0.05).item()
        assert row["clipped_fraction"] == pytest.approx(expected), name
    assert 0 < sum(row["clipped_fraction"] for row in rows) < len(rows)


def test_at_initialisation_most_gradients_of_a_normalizer_free_network_are_zero():
    rows = agc_stats(after_backward(0.0))
    silent = {row["name"] for row in rows if row["zero_grad_units"] == row["units"]}
    assert len(silent) > len(rows) / 2
    assert not any(name.endswith("skipinit_gain") or name.startswith(("stem", "head")) for name in silent)


def test_parameters_without_gradients_have_no_row_and_those_without_elements_no_units():
    model = nn.Linear(3, 2)
    assert agc_stats(model) == []
    model.empty = nn.Parameter(torch.ones(0, 2))
    model.empty.grad = torch.ones(0, 2)
    assert agc_stats(model) == [
        {
            "name": "empty",
            "units": 0,
            "zero_grad_units": 0,
            "non_finite_units": 0,
            "clipped_fraction": 0.0,
            "ratio_quantiles": {},
        }
    ]


@pytest.mark.parametrize("settings", [{"clip_factor": -1.0}, {"eps": math.nan}])
def test_bad_settings_are_refused_by_name(settings):
    with pytest.raises(ValueError, match="must be zero or positive"):
        agc_stats(nn.Linear(2, 2), **settings)


# --- signal propagation ---

NOISE = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
# name -> what holds the blocks, the axis of the channels in a block's output
LAYOUTS = {
    "test_resnet": (["layer1", "layer2", "layer3", "layer4"], 1),
    "resnetv2_18": ([f"stages.{i}.blocks" for i in range(4)], 1),
    "test_nfnet": ([f"stages.{i}" for i in range(4)], 1),
    "test_convnext": ([f"stages.{i}.blocks" for i in range(4)], 1),
    "test_efficientnet": ([f"blocks.{i}" for i in range(5)], 1),
    "regnetx_002": (["s1", "s2", "s3", "s4"], 1),
    "test_mambaout": ([f"stages.{i}.blocks" for i in range(4)], 3),
    "test_vit": (["blocks"], 2),
}


def network(name, **kwargs):
    torch.manual_seed(0)
    kwargs |= {"img_size": 64} if name == "test_vit" else {}
    model = timm.create_model(name, num_classes=3, **kwargs)
    open_branches(model)
    return model


def seen(module, model, x, change=lambda out: out):
    """Inputs and outputs of one module in a forward pass, as numpy arrays."""
    found = []

    def hook(_, args, out):
        found.extend(change(t).detach().double().numpy().copy() for t in (args[0], out))

    with torch.no_grad(), module.register_forward_hook(hook):
        model(x)
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_networks_of_timm_have_a_row_for_every_block_with_the_statistics_of_its_channels(name):
    parents, axis = LAYOUTS[name]
    model = network(name)
    with torch.no_grad():
        model.train()(NOISE)  # running statistics, which evaluation then takes
    rows = signal_stats(model, NOISE)
    names = [f"{parent}.{child}" for parent in parents for child, _ in model.get_submodule(parent).named_children()]
    assert [row["name"] for row in rows] == ["stem", *names]
    model.eval()
    arrays = [seen(model.get_submodule(block), model, NOISE) for block in names]
    for row, array in zip(rows, [arrays[0][0], *(out for _, out in arrays)], strict=True):
        others = tuple(i for i in range(array.ndim) if i != axis)
        assert row["avg_sq_mean"] == pytest.approx((array.mean(others) ** 2).mean(), rel=1e-4, abs=1e-12)
        assert row["avg_var"] == pytest.approx(array.var(others).mean(), rel=1e-4)
        assert (row["expected_var"] is None) == (name != "test_nfnet")


def test_stock_nfnets_have_the_variance_of_the_branch_and_the_expected_one():
    model = network("eca_nfnet_l0").eval()
    rows = {row["name"]: row for row in signal_stats(model, NOISE)}
    block = model.get_submodule("stages.2.4")
    before, after = seen(block, model, NOISE)
    branch = (after - before) / block.alpha  # the skip gain is 1, the shortcut the identity
    assert rows["stages.2.4"]["res_avg_var"] == pytest.approx(branch.var((0, 2, 3)).mean(), rel=1e-3)
    assert rows["stages.2.4"]["expected_var"] == pytest.approx(1 + 5 * block.alpha**2)
    assert (rows["stem"]["res_avg_var"], rows["stem"]["expected_var"]) == (None, 1.0)


@pytest.mark.parametrize(("name", "block", "last"), [("resnet18", "layer2.1", "bn2"), ("resnet26", "layer4.1", "bn3")])
def test_resnets_have_the_variance_of_the_branch_before_it_is_added(name, block, last):
    model = network(name)
    with torch.no_grad():
        model.train()(NOISE)
    row = next(row for row in signal_stats(model, NOISE) if row["name"] == block)
    _, branch = seen(model.get_submodule(f"{block}.{last}"), model.eval(), NOISE, torch.clone)
    assert row["res_avg_var"] == pytest.approx(branch.var((0, 2, 3)).mean(), rel=1e-4)


def test_preactivation_resnets_have_the_variance_of_what_is_added():
    model = network("resnetv2_18").eval()
    row = next(row for row in signal_stats(model, NOISE) if row["name"] == "stages.2.blocks.1")
    with torch.no_grad():
        for norm in model.modules():  # as in the first step of a training
            norm.training = isinstance(norm, nn.BatchNorm2d)
    before, after = seen(model.get_submodule("stages.2.blocks.1"), model, NOISE)
    assert row["res_avg_var"] == pytest.approx((after - before).var((0, 2, 3)).mean(), rel=1e-3)


def test_batch_normalisation_that_has_seen_no_batch_takes_this_one():
    model = network("test_resnet")
    rows = signal_stats(model, NOISE)
    trained = copy.deepcopy(model).train()
    _, out = seen(trained.get_submodule("layer4.0"), trained, NOISE)
    assert rows[-1]["avg_var"] == pytest.approx(out.var((0, 2, 3)).mean(), rel=1e-4)
    assert signal_stats(trained, NOISE)[-1]["avg_var"] != pytest.approx(rows[-1]["avg_var"], rel=0.01)  # not any more


@pytest.mark.parametrize("name", ["test_resnet", "nfnet_f0"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_found(name, fails):
    model = create("NFNet", drop_path_rate=0.5) if name == "nfnet_f0" else network(name)
    for index, module in enumerate(model.modules()):
        module.training = index % 3 > 0  # parts of a network may be frozen
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    x = NOISE.clone().requires_grad_()
    if fails:
        with pytest.raises(RuntimeError):
            signal_stats(model, x[:, :2])
        list(model.children())[-1].forward = None  # after all blocks
        with pytest.raises(TypeError):
            signal_stats(model, x)
    else:
        signal_stats(model, x)
    assert [module.training for module in model.modules()] == modes
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert x.grad is None
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_wrapped_model_has_the_rows_of_the_model():
    model = create("NFNet")
    assert signal_stats(nn.DataParallel(model), NOISE) == signal_stats(model, NOISE)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rexnet_100", "residual blocks in stages, blocks, .*got RexNet"),
        ("visformer_tiny", "residual blocks in stages, blocks, .*got Visformer"),
        ("hrnet_w18_small", "HighResolutionNet has blocks in 'stage2' as well"),
        ("cait_xxs24_224", "Cait has blocks in 'blocks_token_only' as well"),
        ("tiny_vit_5m_224", r"128 channels on axis 1 at stages.1.blocks.0, got shape \(1, 28, 28, 128\)"),
    ],
)
def test_networks_without_blocks_or_with_other_layouts_are_refused(name, message):
    model = timm.create_model(name, num_classes=0)
    with pytest.raises(TypeError, match=message):
        signal_stats(model, torch.zeros(1, 3, 224, 224))
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_a_block_that_gives_more_than_one_tensor_is_refused():
    """As those of timm's efficientvim_m1 do, which timm has since 1.0.30."""
    model = timm.create_model("test_resnet")
    model.layer2.append(Twice())
    with pytest.raises(TypeError, match=r"at layer2\.1, got tuple"):
        signal_stats(model, torch.zeros(1, 3, 64, 64))


class Twice(nn.Module):
    def forward(self, x):
        return x, x


def test_the_channel_axis_of_tokens_is_the_last():
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=0)
    nn.init.constant_(model.pos_embed, 0)
    model.pos_embed.data[..., 0] = 4.0  # one of 16 channels has a mean
    nn.init.constant_(model.cls_token, 0)
    rows = signal_stats(model, torch.zeros(2, 3, 32, 32))
    assert rows[0]["avg_sq_mean"] == pytest.approx(1, rel=0.1)


# Narrow stems scatter by some percent, and where maps are small the zeros of the padding take away a few.
@pytest.mark.parametrize(
    ("name", "size", "draws", "tolerance", "kwargs"),
    [
        ("dm_nf_resnet50", 224, 1, 0.06, {}),
        ("nfnet_f0", 192, 1, 0.05, {"avg_down": False}),
        ("dm_nf_regnet_b0", 192, 4, 0.08, {"avg_down": False}),  # narrow: one draw is up to 12 % off
    ],
)
def test_at_initialisation_with_skip_gains_of_1_the_variance_follows_the_analytic_one(
    name, size, draws, tolerance, kwargs
):
    variances = []
    for seed in range(draws):
        torch.manual_seed(seed)
        model = timm.create_model(name, **kwargs)
        assert open_branches(model) == sum(model.cfg.depths)
        rows = signal_stats(model, torch.randn(4, 3, size, size))[1:]
        expected = [1 + (k + 1) * 0.2**2 for depth in model.cfg.depths for k in range(depth)]
        assert [row["expected_var"] for row in rows] == pytest.approx(expected)
        variances.append([row["avg_var"] for row in rows])
    assert torch.tensor(variances).mean(0).tolist() == pytest.approx(expected, rel=tolerance)


def test_a_pooling_shortcut_divides_the_variance_of_noise_by_four():
    torch.manual_seed(0)
    model = timm.create_model("nfnet_f0")
    open_branches(model)
    rows = {row["name"]: row for row in signal_stats(model, torch.randn(8, 3, 96, 96))}
    assert rows["stages.0.0"]["avg_var"] == pytest.approx(1.04, rel=0.08)
    branch = 0.04 * rows["stages.1.0"]["res_avg_var"]
    assert rows["stages.1.0"]["avg_var"] - branch == pytest.approx(0.25, rel=0.15)

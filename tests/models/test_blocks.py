from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.reference_nfnet import Net
from tests.support.small_nets import FAMILIES, NETS, batch, build, create, nchw, relative_error, state_dict, tree
from timm_nf.models.blocks import NormFreeBlock

EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def blocks_of(model: nn.Module) -> list[NormFreeBlock]:
    return [m for m in model.modules() if isinstance(m, NormFreeBlock)]


@contextmanager
def recorded(modules: list[Any]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """(input, output) of every call of `modules`."""
    calls: list[tuple[Tensor, Tensor]] = []
    handles = [m.register_forward_hook(lambda _, args, out: calls.append((args[0], out))) for m in modules]
    yield calls
    for handle in handles:
        handle.remove()


class Operations(TorchDispatchMode):
    """Names of the operations whose result is an activation of `batch_size` examples, not one number per channel."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size, self.names = batch_size, []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.ndim == 4 and out.shape[0] == self.batch_size and out[0, 0].numel() > 1:
            self.names.append(func.overloadpacket.__name__)
        return out


@EACH_FAMILY
@pytest.mark.parametrize(("h", "w"), [(8, 8), (7, 10), (5, 1)])
def test_every_block_equals_the_reference(family: str, h: int, w: int) -> None:
    net, params = NETS[family], tree(NETS[family])
    for number, block in enumerate(blocks_of(build(family))):
        x = np.random.default_rng(number).standard_normal((2, h, w, net.blocks()[number]["in_chs"]))
        expected, _ = net.block(params, number, x)
        with torch.no_grad():
            got = block(nchw(x))
        assert relative_error(got, nchw(expected)) < 1e-12, number


@pytest.mark.parametrize("rd_ratio", [0.5, None])
def test_blocks_of_every_shortcut_equal_the_reference(rd_ratio: float | None) -> None:
    # The first block has as many channels in as out and no stride: the only one of a first stage without a shortcut.
    for family, stem_chs in (("NFNet", 32), ("NF_ResNet", 32)):
        net = Net(family, (2, 2), (32, 48), stem_chs=stem_chs, group_size=8, rd_ratio=rd_ratio)
        assert [row["shortcut"] for row in net.blocks()] == [False, False, True, False]
        model = build(net)
        assert [b.downsample is not None for b in blocks_of(model)] == [False, False, True, False]
        with torch.no_grad(), recorded(blocks_of(model)) as calls:
            model(batch(1, 33, 40))
        for number, (x, out) in enumerate(calls):
            expected, _ = net.block(tree(net), number, x.numpy().transpose(0, 2, 3, 1))
            assert relative_error(out, nchw(expected)) < 1e-12


@EACH_FAMILY
@pytest.mark.parametrize("training", [False, True])
def test_no_activation_is_multiplied_by_a_constant_and_a_block_ends_in_one_addcmul(family: str, training: bool) -> None:
    model = build(family, drop_path_rate=0.5).float().train(training)
    with recorded(blocks_of(model)) as calls:
        model(batch(3, dtype=torch.float32))
    gates = int(family == "NF_RegNet")  # squeeze-excite in the middle of the branch multiplies, of course
    arithmetic = ("mul", "div", "add", "sub", "addcmul", "addcdiv", "mul_", "div_", "add_", "sub_", "addcmul_")
    for block, (x, _) in zip(blocks_of(model), calls, strict=True):
        with Operations(3) as ops:
            block(x.detach())
        assert ops.names[-1] == "addcmul"
        assert [name for name in ops.names if name in arithmetic] == ["mul"] * gates + ["addcmul"]
    with Operations(3) as ops:
        model(batch(3, dtype=torch.float32))
    n = len(calls)
    # gamma of the last activation, which no convolution follows
    assert [x for x in ops.names if x in arithmetic] == (["mul"] * gates + ["addcmul"]) * n + ["mul"]


@EACH_FAMILY
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_block_outputs_stay_in_the_dtype_of_autocast(family: str, training: bool, dtype: torch.dtype) -> None:
    model = create(family, drop_path_rate=0.5).train(training)
    inner = [m for b in blocks_of(model) for m in b.modules() if not isinstance(m, nn.Identity)]
    drops = [m for m in inner if type(m).__name__ == "StochasticDepth"]
    assert len(drops) == len(blocks_of(model)) - 1
    watched = [m for m in inner if m not in drops] + [model.stem]
    with recorded(watched) as calls, torch.autocast("cpu", dtype):
        logits = model(batch(2, dtype=torch.float32))
    assert len(calls) == len(watched)
    assert {out.dtype for _, out in calls} == {dtype}
    assert logits.dtype is dtype
    logits.float().square().sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


@EACH_FAMILY
def test_autocast_logits_are_close_to_float32(family: str) -> None:
    model = build(family, torch.float32)
    x = batch(2, dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = model(x)
    with torch.no_grad():
        assert relative_error(got.float(), model(x)) < 0.03  # bfloat16 has 8 bits


def test_residual_branch_starts_at_zero_and_its_gain_is_one_element() -> None:
    for family in FAMILIES:
        for block in blocks_of(create(family)):
            assert block.skipinit_gain.shape == (1,)
            assert block.skipinit_gain.item() == 0
            x = torch.randn(2, block.conv1.in_channels, 4, 4)
            expected = x if block.downsample is None else block.downsample(block.act1(x))
            assert torch.equal(block(x), expected)


@EACH_FAMILY
@pytest.mark.parametrize("assign", [False, True])
def test_scalar_and_one_element_skip_gains_load_and_the_callers_dict_stays(family: str, assign: bool) -> None:
    loaded = []
    for shape in ((), (1,)):
        state = {k: v.reshape(shape) if k.endswith("skipinit_gain") else v for k, v in state_dict(NETS[family]).items()}
        before = dict(state)
        model = create(family).double()
        model.load_state_dict(state, strict=True, assign=assign)
        assert state.keys() == before.keys()
        assert all(state[k] is v for k, v in before.items())
        assert {v.shape for k, v in state.items() if k.endswith("skipinit_gain")} == {torch.Size(shape)}
        assert {b.skipinit_gain.shape for b in blocks_of(model)} == {torch.Size([1])}
        loaded.append(model.state_dict())
    for name, tensor in loaded[0].items():
        assert torch.equal(tensor, loaded[1][name])


def test_a_skip_gain_of_another_shape_is_refused() -> None:
    state = state_dict(NETS["NFNet"]) | {"stages.0.0.skipinit_gain": torch.ones(2)}
    with pytest.raises(RuntimeError, match=r"stages\.0\.0\.skipinit_gain"):
        build("NFNet").load_state_dict(state)


@EACH_FAMILY
def test_a_dropped_example_passes_by_its_shortcut_and_the_others_are_not_rescaled(family: str) -> None:
    model = build(family, drop_path_rate=0.8)
    for number, block in enumerate(blocks_of(model)):
        x = torch.randn(64, block.conv1.in_channels, 2, 3, dtype=torch.float64)
        with torch.no_grad():
            kept = block.eval()(x)
            shortcut = x if block.downsample is None else block.downsample(block.act1(x))
            torch.manual_seed(0)
            out = block.train()(x)
        is_kept, is_dropped = ((out - y).abs().flatten(1).amax(1) < 1e-12 for y in (kept, shortcut))
        assert (is_kept ^ is_dropped).all()
        assert is_dropped.any() == (number > 0)
        assert is_kept.any()

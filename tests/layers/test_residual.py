import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from timm_nf.layers import SameConv2d
from timm_nf.layers.padding import same_padding
from timm_nf.layers.residual import add_scaled, global_mean

FORWARD_MODE = pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")  # torch's own, on its way to jvp


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


GAINS = pytest.mark.parametrize("gain_shape", [(1,), (2, 1, 1, 1)], ids=["one", "an example"])
GATES = pytest.mark.parametrize("gate_shape", [None, (2, 3, 1, 1)], ids=["no gate", "gate"])


@GAINS
@GATES
@FORWARD_MODE
def test_all_derivatives_of_the_sum_pass_the_numerical_check(
    gain_shape: tuple[int, ...], gate_shape: tuple[int, ...] | None
) -> None:
    gate = [randn(*gate_shape, seed=4)] if gate_shape else []
    inputs = randn(2, 3, 2, 2, seed=1), randn(2, 3, 2, 2, seed=2), randn(*gain_shape, seed=3), *gate
    assert gradcheck(add_scaled, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(add_scaled, inputs)


@FORWARD_MODE
def test_all_derivatives_of_the_mean_pass_the_numerical_check() -> None:
    assert gradcheck(global_mean, (randn(2, 3, 2, 4),), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(lambda x: global_mean(x).square(), (randn(2, 3, 2, 4),))


def test_per_example_gradients_equal_those_of_one_example_at_a_time() -> None:
    x, gain, gate = (t.detach() for t in (randn(4, 3, 2, 2), randn(1), randn(3, 1, 1)))

    def loss(x: Tensor, gain: Tensor, gate: Tensor) -> Tensor:
        x = x[None]
        return add_scaled(x, x.sin(), gain, gate[None] * global_mean(x)).square().sum()

    slope = torch.func.grad(loss, (0, 1, 2))
    got = torch.func.vmap(slope, (0, None, None))(x, gain, gate)
    expected = [torch.stack(g) for g in zip(*(slope(one, gain, gate) for one in x), strict=True)]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 3, 2, 2), (2, 1, 2, 2), (2, 3, 1, 1)], ids=str)
def test_axes_of_length_one_are_not_summed_away(shape: tuple[int, ...]) -> None:
    n, c = shape[:2]
    inputs = randn(*shape, seed=1), randn(*shape, seed=2), randn(n, 1, 1, 1, seed=3), randn(n, c, 1, 1, seed=4)
    shortcut, out, gain, gate = inputs
    expected = torch.autograd.grad((shortcut + out * gain * gate).sin().sum(), inputs)
    got = torch.autograd.grad(add_scaled(*inputs).sin().sum(), inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_sum_keeps_the_dtype_of_the_branch_and_gradients_those_of_their_inputs() -> None:
    half = [torch.randn(2, 3, 4, 4).bfloat16().requires_grad_() for _ in range(2)]
    gain, gate = torch.ones(1, requires_grad=True), torch.rand(2, 3, 1, 1).bfloat16().requires_grad_()
    out = add_scaled(*half, gain, gate)
    assert out.dtype is torch.bfloat16
    out.float().square().sum().backward()
    for x in (*half, gain, gate):
        assert x.grad is not None
        assert (x.grad.dtype, x.grad.shape) == (x.dtype, x.shape)


class Moved(TorchDispatchMode):
    """Elements of full-size tensors that operations read and write, in multiples of one."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.times = numel, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in ("detach", "view", "expand", "alias"):
            self.times += sum(isinstance(x, Tensor) and x.numel() == self.numel for x in (*args, out))
        return out


def test_the_backward_pass_of_a_gated_sum_moves_nine_tensors_of_its_size() -> None:
    shape = (2, 8, 6, 6)
    shortcut, x = (torch.empty(shape, device="meta", requires_grad=True) for _ in range(2))
    out = x * 1.0  # not a leaf, so that gradients are summed as inside a network
    y = add_scaled(shortcut, out, torch.empty(1, device="meta", requires_grad=True), global_mean(out))
    cotangent = torch.empty_like(y)
    with Moved(shortcut.numel()) as moved:
        torch.autograd.grad(y, (shortcut, x), cotangent)
    assert moved.times == 9 + 2  # and the product by 1 above


@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize("stride", [2, 3])
def test_the_convolution_without_a_padded_copy_equals_the_padded_one(kernel_size: int, stride: int) -> None:
    conv = SameConv2d(4, 4, kernel_size, stride).double()
    for height in range(1, 12):
        for width in (6, 7, 8):
            x = randn(2, 4, height, width)
            top, bottom = same_padding(height, kernel_size, stride)
            left, right = same_padding(width, kernel_size, stride)
            padded = torch.nn.functional.pad(x, (left, right, top, bottom))
            expected = torch.nn.functional.conv2d(padded, conv.weight, conv.bias, stride)
            got = conv._unpadded(x, [top, left], [bottom, right])
            assert got.shape == expected.shape
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_an_accelerator_pads_no_activation_and_copies_no_odd_size() -> None:
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    conv = SameConv2d(16, 16, 3, 2, device="meta")
    for size in (7, 8):
        names: list[str] = []
        with Names():
            assert conv(torch.empty(1, 16, size, size, device="meta")).shape == (1, 16, 4, 4)
        assert "constant_pad_nd" not in names

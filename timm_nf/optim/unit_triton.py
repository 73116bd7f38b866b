"""Two kernels for accelerators: the norms of the output units of many tensors, and the scaling of these units.

torch's foreach functions only know whole tensors, and work tensor by tensor if shapes differ.

Our kernels are operations of torch's dispatcher. They have an implementation for meta tensors, and exist without Triton
too. Devices without Triton use the same functions as the CPU.

Examples:
    >>> from timm_nf.optim.units import layout_of
    >>> weight, grad = torch.ones(4, 3, device="meta"), torch.ones(4, 3, device="meta")
    >>> takes_kernel(torch.ones(4, 3), torch.ones(4, 3), layout_of((4, 3), axis=0))  # tensors on the CPU
    False
    >>> weight_norms, grad_norms = unit_norms([weight], [grad], counts=[4])
    >>> scale_units_([grad], [4], scales=weight_norms)
    >>> weight_norms.shape
    torch.Size([4])
"""

# torch.library has no types.
# pyright: standard

from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .._triton import has_triton
from .sharded import PLAIN
from .units import ROWS, SINGLE, Layout

__all__ = ["scale_units_", "takes_kernel", "unit_norms"]

_LIBRARY = torch.library.Library("timm_nf", "FRAGMENT")
_LIBRARY.define("unit_norms(Tensor[] weights, Tensor[] grads, int[] counts) -> (Tensor, Tensor)")
_LIBRARY.define("scale_units_(Tensor(a!)[] grads, int[] counts, Tensor scales) -> ()")


def takes_kernel(weight: Tensor, grad: Tensor, layout: Layout) -> bool:
    """Whether the kernels take this weight and its gradient: eager, on an accelerator, with rows in one piece.

    Meta tensors stand for an accelerator with Triton, and fake tensors for their device.
    """
    return (
        grad.device.type != "cpu"
        and has_triton(grad.device.type)
        and layout in (SINGLE, ROWS)
        and not torch.compiler.is_compiling()
        and all(type(x) in (*PLAIN, FakeTensor) and _is_dense(x) for x in (weight, grad))
    )


def _is_dense(x: Tensor) -> bool:
    """Whether every row is one piece of memory, and the rows follow each other."""
    return (
        x.is_contiguous()
        or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
        or (x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d))
    )


def unit_norms(weights: list[Tensor], grads: list[Tensor], counts: list[int]) -> tuple[Tensor, Tensor]:
    """Norms of all units of weights and of their gradients.

    Args:
        weights: Tensors on one device and of one dtype. Every unit is a row, in one piece of memory.
        grads: Their gradients, laid out in the same way.
        counts: Number of units of each tensor.

    Returns:
        The weight norms and the gradient norms, (units,) each, in at least float32.
    """
    return torch.ops.timm_nf.unit_norms.default(weights, grads, counts)


def scale_units_(grads: list[Tensor], counts: list[int], scales: Tensor) -> None:
    """Multiply every unit by its scale, in place and rounded once. Units with a scale of 1 are not written.

    Args:
        grads: Gradients on one device and of one dtype. Every unit is a row, in one piece of memory.
        counts: Number of units of each gradient.
        scales: A factor for each unit, (units,), in at least float32.
    """
    torch.ops.timm_nf.scale_units_.default(grads, counts, scales)


@cache
def _kernels() -> ModuleType:
    from . import _unit_kernels

    return _unit_kernels


def _norms_meta(weights: list[Tensor], grads: list[Tensor], counts: list[int]) -> tuple[Tensor, Tensor]:
    weight_norms, grad_norms = (
        x.new_empty(sum(counts), dtype=torch.promote_types(x.dtype, torch.float32)) for x in (weights[0], grads[0])
    )
    return weight_norms, grad_norms


def _norms_triton(weights: list[Tensor], grads: list[Tensor], counts: list[int]) -> tuple[Tensor, Tensor]:
    norms = _norms_meta(weights, grads, counts)
    kernels = _kernels()
    kernels.launch(kernels.norms, (weights, grads), counts, norms)
    return norms


def _scale_meta(grads: list[Tensor], counts: list[int], scales: Tensor) -> None:
    pass


def _scale_triton(grads: list[Tensor], counts: list[int], scales: Tensor) -> None:
    kernels = _kernels()
    kernels.launch(kernels.scale, (grads,), counts, (scales,))


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("unit_norms", _norms_triton, _key)
    _LIBRARY.impl("scale_units_", _scale_triton, _key)
_LIBRARY.impl("unit_norms", _norms_meta, "Meta")
_LIBRARY.impl("scale_units_", _scale_meta, "Meta")

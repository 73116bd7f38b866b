"""The relative L2 error of a tensor."""

# torch's types of norm and item are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from torch import Tensor


def relative_error(measured: Tensor, expected: Tensor) -> float:
    """L2 norm of `measured - expected`, divided by the L2 norm of `expected`. Computed in float64 on the CPU.

    Args:
        measured: Any shape.
        expected: The same shape.

    Raises:
        ValueError: if the shapes differ.
    """
    if measured.shape != expected.shape:
        raise ValueError(f"expected shape {tuple(expected.shape)}, got {tuple(measured.shape)}")
    measured, expected = (x.detach().cpu().double() for x in (measured, expected))
    return ((measured - expected).norm() / expected.norm()).item()

"""How far a tensor is from what was expected, as one number."""

# torch types norm and item in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from torch import Tensor


def relative_error(measured: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference over the L2 norm of `expected`, computed in float64 on the CPU.

    Args:
        measured: Any shape.
        expected: The same shape.

    Raises:
        ValueError: The shapes differ.
    """
    if measured.shape != expected.shape:
        raise ValueError(f"expected shape {tuple(expected.shape)}, got {tuple(measured.shape)}")
    measured, expected = (x.detach().cpu().double() for x in (measured, expected))
    return ((measured - expected).norm() / expected.norm()).item()

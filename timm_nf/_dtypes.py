"""The floating dtypes in which networks compute, and the names of dtypes."""

import torch

__all__ = ["FLOATS", "dtype_name"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # not 8 bits
"""The dtypes in which networks compute."""


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without `torch.`.

    Examples:
        >>> dtype_name(torch.bfloat16)
        'bfloat16'
    """
    return str(dtype).removeprefix("torch.")

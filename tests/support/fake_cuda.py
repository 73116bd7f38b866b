"""What fake tensors of a CUDA device need on a machine without one."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.support import OLD_TORCH

NEEDS_NO_DRIVER = pytest.mark.skipif(
    OLD_TORCH and not torch.cuda.is_available(), reason="torch below 2.9 asks CUDA's driver about fake tensors"
)


@contextmanager
def autocast(enabled: bool = True) -> Iterator[None]:
    """Autocast to bfloat16 on CUDA, which `torch.autocast` refuses where there is no such device."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", enabled)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    yield
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])
    torch.clear_autocast_cache()

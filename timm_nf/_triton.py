"""Tells whether Triton's kernels run on a device."""

# Triton has no types.
# pyright: standard

import importlib.util
import logging
import os
from functools import cache

import torch
from torch.torch_version import TorchVersion

OLDEST = "3.4"  # torch 2.8 brings it; older ones do not take the tuples of addresses that our kernels get

_logger = logging.getLogger(__name__)


@cache
def has_triton(device_type: str) -> bool:
    """Whether the kernels run on a device. Meta tensors stand for a device on which they do."""
    if device_type == "meta":
        return True
    interpreted = device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if importlib.util.find_spec("triton") is None or not (interpreted or device_type == "cuda"):  # "cuda" is ROCm too
        return False
    if _is_too_old():
        return False
    if device_type == "cuda" and torch.cuda.is_available():  # without a device, the tensors are fake
        return _starts()
    return True


def _is_too_old() -> bool:
    """Whether Triton is older than what the kernels need. An older torch brings such a one."""
    import triton

    old = TorchVersion(triton.__version__) < OLDEST
    if old:
        _logger.warning(
            "Triton %s is older than %s: plain operations do its kernels' work, more slowly", triton.__version__, OLDEST
        )
    return old


def _starts() -> bool:
    """Whether Triton can build its driver. It needs a C compiler, which a machine may lack."""
    import triton

    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # the compiler's and Triton's own
        _logger.warning("Triton does not start, plain operations do its kernels' work, more slowly: %s", error)
        return False
    return True

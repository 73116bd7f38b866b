"""Describes the machine and the versions, for bug reports and measurements.

Examples:
    >>> "torch" in environment()
    True
    >>> machine().startswith("timm_nf")
    True
"""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from ._dtypes import dtype_name
from ._text import counted
from .version import __version__

__all__ = ["environment", "machine"]

_PACKAGES = ("torch", "timm", "huggingface_hub", "safetensors", "numpy")


def environment() -> dict[str, str]:
    """Versions, processor, threads, and the devices with their autocast dtypes, as text by name."""
    rows = {"python": f"{platform.python_version()} on {platform.platform()}"}
    rows["timm_nf"] = __version__
    rows |= {name: _version(name) for name in _PACKAGES}
    rows["processor"] = f"{_processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    rows["threads"] = f"{torch.get_num_threads()} in an operation, {torch.get_num_interop_threads()} between operations"
    devices = {"cpu": "cpu"}
    if torch.cuda.is_available():
        devices |= {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        rows["cuda"] = f"{torch.version.cuda or torch.version.hip}, cuDNN {torch.backends.cudnn.version()}"
    if torch.backends.mps.is_available():
        devices["mps"] = platform.processor()
    for name, description in devices.items():
        rows[f"device {name}"] = f"{description}, autocast to {_autocast(name.partition(':')[0])}"
    return rows


def machine() -> str:
    """One line for captions: versions, processor and threads."""
    threads = torch.get_num_threads()
    return (
        f"timm_nf {__version__}, torch {_version('torch')}, timm {_version('timm')}, "
        f"{_processor()}, {counted(threads, 'thread')}"
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _autocast(device_type: str) -> str:
    if not torch.amp.is_autocast_available(device_type):
        return "nothing"
    return dtype_name(torch.get_autocast_dtype(device_type))

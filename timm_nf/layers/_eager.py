"""Tells whether operations on a tensor run now, or are recorded for a compiler or a file."""

# torch.jit exports names without listing them.
# pyright: reportPrivateImportUsage=false

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

_TYPES = (Tensor, nn.Parameter, FakeTensor)
_TELLS_EXPORT = hasattr(torch.compiler, "is_exporting")  # not in torch 2.6


@torch.jit.unused  # TorchScript also compiles functions that it never calls
def is_eager(x: Tensor) -> bool:
    """Whether `x` is an ordinary tensor and nothing compiles, exports or traces.

    If not, layers use torch's plain operations instead of our own. Compilers fuse plain operations, and exported files
    cannot hold others. Tensor subclasses get plain operations too: their elements may lie in several pieces.
    """
    return not torch.compiler.is_compiling() and type(x) in _TYPES and not torch.jit.is_tracing()


@torch.jit.unused
def has_fixed_sizes(x: Tensor) -> bool:
    """Whether the sizes of `x` are plain numbers. If so, code may branch on them.

    If a compiler or exporter records the computation, sizes may be symbols. A branch on their parity then holds for
    all sizes.
    """
    return is_eager(x) and all(type(size) is int for size in x.shape)


@torch.jit.unused
def is_compiled_here() -> bool:
    """Whether `torch.compile` records, for this process alone. Exporters record for other tools."""
    return _TELLS_EXPORT and torch.compiler.is_compiling() and not torch.compiler.is_exporting()


@torch.jit.unused
def recorded_call(function: Callable[..., Tensor], *args: Any) -> Any:
    """One call of `function` in a symbolic trace, or None if no argument is a proxy.

    For functions that ask for what a proxy cannot answer, such as a number of axes.
    """
    for arg in args:
        if isinstance(arg, torch.fx.Proxy):
            return arg.tracer.create_proxy("call_function", function, args, {})
    return None

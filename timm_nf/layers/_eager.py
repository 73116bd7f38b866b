"""Whether a tensor is computed with now, or recorded for later."""

# torch.jit does not list what it exports.
# pyright: reportPrivateImportUsage=false

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

_TYPES = (Tensor, nn.Parameter, FakeTensor)


@torch.jit.unused  # TorchScript compiles also what it will not call
def is_eager(x: Tensor) -> bool:
    """Whether `x` is an ordinary tensor and nothing compiles, exports or traces.

    What records a computation sees plain tensor operations instead of our own, since compilers fuse those and files
    hold nothing else. So do subclasses of tensors, which may not hold their elements in one piece.
    """
    return not torch.compiler.is_compiling() and type(x) in _TYPES and not torch.jit.is_tracing()


@torch.jit.unused
def has_fixed_sizes(x: Tensor) -> bool:
    """Whether the sizes of `x` are plain numbers, on which a choice may rest.

    Where a computation is recorded they may be symbols. A choice by their parity would then hold for every later size.
    """
    return is_eager(x) and all(type(size) is int for size in x.shape)

"""The gate of squeeze-excite, which timm's layer multiplies into the activations."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..variants import squeeze_chs


class SqueezeExcite(nn.Module):
    """The gate of squeeze-excite, sigmoid(fc2(relu(fc1(mean(x))))), which the block applies with its constants.

    Args:
        channels: C, of input and gate.
        rd_ratio: Hidden width as a fraction of `channels`, see `squeeze_chs`.
        device: Of the parameters.
        dtype: Of the parameters.

    Source: nfnets/base.py, SqueezeExcite; relu as in the code, where arXiv:2102.06171 writes gelu.
    """

    def __init__(self, channels: int, rd_ratio: float = 0.5, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        hidden = squeeze_chs(channels, rd_ratio)
        self.fc1 = nn.Conv2d(channels, hidden, 1, device=device, dtype=dtype)
        self.fc2 = nn.Conv2d(hidden, channels, 1, device=device, dtype=dtype)
        for fc in (self.fc1, self.fc2):  # haiku's default for a linear layer
            std = fc.in_channels**-0.5
            nn.init.trunc_normal_(fc.weight, std=std, a=-2 * std, b=2 * std)
            assert fc.bias is not None
            nn.init.zeros_(fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, 1, 1)."""
        x = x.mean((2, 3), keepdim=True)
        if torch.jit.is_scripting() or torch.compiler.is_compiling() or self._calls_are_seen():
            x = self.fc2(F.relu(self.fc1(x)))
        else:
            # A matrix product takes the weight as it is; for a convolution oneDNN copies it into another layout at
            # every call, as scripts/profile_inference.py shows of the other ones.
            x = F.relu(F.linear(x.flatten(1), self.fc1.weight.flatten(1), self.fc1.bias))
            x = F.linear(x, self.fc2.weight.flatten(1), self.fc2.bias)[:, :, None, None]
        return torch.sigmoid(x)

    @torch.jit.unused
    def _calls_are_seen(self) -> bool:
        """Whether a convolution has a hook on it or is not torch's own, so that it has to be called as a module."""
        for fc in (self.fc1, self.fc2):
            hooks = (fc._forward_hooks, fc._forward_pre_hooks, fc._backward_hooks, fc._backward_pre_hooks)
            if type(fc) is not nn.Conv2d or any(hooks):
                return True
        return False

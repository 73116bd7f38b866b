"""timm's own clipping and standardisation, to compare with.

Import this module before timm_nf, which replaces timm's clipping.
"""

import torch
import torch.nn.functional as F
from timm.utils.agc import adaptive_clip_grad as timm_clip

__all__ = ["timm_clip", "timm_route"]


def timm_route(weight: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """What timm.layers.ScaledStdConv2dSame computes before its convolution."""
    rows = weight.reshape(1, weight.shape[0], -1)
    scale = (gain * weight[0].numel() ** -0.5).view(-1)
    return F.batch_norm(rows, None, None, weight=scale, training=True, momentum=0.0, eps=1e-5).reshape_as(weight)

"""Adaptive gradient clipping, as a function and in front of any timm optimizer."""

from .agc import adaptive_clip_grad_, unitwise_norm
from .factory import register
from .groups import param_groups_agc
from .optimizer import AdaptiveClipping, agc_class

__all__ = [
    "AdaptiveClipping",
    "adaptive_clip_grad_",
    "agc_class",
    "param_groups_agc",
    "register",
    "unitwise_norm",
]

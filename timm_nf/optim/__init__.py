"""Adaptive gradient clipping, as a function and in front of any timm optimizer."""

from .agc import ClipStats, adaptive_clip_grad_, unitwise_norm
from .exempt import classifier_weights
from .factory import register, unregister
from .groups import param_groups_agc
from .optimizer import AdaptiveClipping, agc_class

__all__ = [
    "AdaptiveClipping",
    "ClipStats",
    "adaptive_clip_grad_",
    "agc_class",
    "classifier_weights",
    "param_groups_agc",
    "register",
    "unitwise_norm",
    "unregister",
]

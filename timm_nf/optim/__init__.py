"""Adaptive gradient clipping, as a function and in front of any timm optimizer.

Examples:
    >>> model = timm.create_model("test_vit", num_classes=10)
    >>> optimizer = timm.optim.create_optimizer_v2(model, "agcadamw", lr=1e-3, clip_factor=0.01)
    >>> type(optimizer) is timm_nf.optim.AgcAdamW, isinstance(optimizer, AdaptiveClipping)
    (True, True)
    >>> model(torch.randn(1, 3, 160, 160)).sum().backward()
    >>> optimizer.step()
    >>> rows: list[ClipStats] = optimizer.clip_stats()
    >>> sum(row["units"] for row in rows)
    3190
"""

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

"""Normalizer-free networks and adaptive gradient clipping for timm, exactly as in the papers.

The import registers the networks as timm models (`nfnet_f0`, ...) and the clipping optimizers in timm's factory
(`agcsgd`, ...). It also replaces the clipping function behind timm's `--clip-mode agc`.
"""

from ._versions import require_versions

require_versions()  # before anything that an older version lacks

# ruff: noqa: E402
from . import convert, diagnostics, hub, nfnets, optim, recipes
from .inference.fuse import fuse
from .layers.standardize import standardize_weight
from .models.normalizer_free import normalizer_free, replace_convs
from .optim.agc import adaptive_clip_grad_, unitwise_norm
from .optim.groups import param_groups_agc
from .registration import register, unregister
from .version import __version__

__all__ = [
    "__version__",
    "adaptive_clip_grad_",
    "convert",
    "diagnostics",
    "fuse",
    "hub",
    "nfnets",
    "normalizer_free",
    "optim",
    "param_groups_agc",
    "recipes",
    "register",
    "replace_convs",
    "standardize_weight",
    "unitwise_norm",
    "unregister",
]

register()

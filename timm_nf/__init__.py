"""Normalizer-free networks and adaptive gradient clipping, exactly as in the papers, for timm.

Importing registers the networks as timm models (`nfnet_f0`, ...), the clipping optimizers with timm's factory
(`agcsgd`, ...), and the clipping function behind timm's `--clip-mode agc`.
"""

from . import convert, diagnostics, hub, nfnets, optim, recipes
from .inference.fuse import fuse
from .layers.standardize import standardize_weight
from .models.normalizer_free import normalizer_free, replace_convs
from .optim.agc import adaptive_clip_grad_, unitwise_norm
from .optim.groups import param_groups_agc
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
    "replace_convs",
    "standardize_weight",
    "unitwise_norm",
]

optim.register()

"""Normalizer-free networks, exactly as in the papers, for timm."""

from . import convert, nfnets, optim

optim.register()

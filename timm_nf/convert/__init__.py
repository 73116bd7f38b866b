"""Reads the authors' checkpoints safely, converts them to timm's names and back, and recognises their networks."""

from .haiku import haiku_to_timm, timm_to_haiku
from .haiku_pickle import load_haiku
from .infer import infer_variant, load_haiku_into

__all__ = ["haiku_to_timm", "infer_variant", "load_haiku", "load_haiku_into", "timm_to_haiku"]

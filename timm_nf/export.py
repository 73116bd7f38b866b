"""Door to `timm_nf.inference.export`, so that `from timm_nf.export import ...` stays valid."""

from .inference.export import *  # noqa: F403
from .inference.export import __all__ as __all__

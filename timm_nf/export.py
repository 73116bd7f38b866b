"""Another name for `timm_nf.inference.export`, so that `from timm_nf.export import ...` works."""

from .inference.export import *  # noqa: F403
from .inference.export import __all__ as __all__

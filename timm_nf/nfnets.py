"""Another name for `timm_nf.models.nfnets`, so that `from timm_nf.nfnets import ...` works."""

from .models.nfnets import *  # noqa: F403  (timm's registry adds the entrypoints to its __all__)
from .models.nfnets import __all__ as __all__

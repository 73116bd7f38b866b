"""Door to `timm_nf.models.nfnets`, so that `from timm_nf.nfnets import ...` stays valid."""

from .models.nfnets import *  # noqa: F403  (timm's registry has put the entrypoints into its __all__)
from .models.nfnets import __all__ as __all__

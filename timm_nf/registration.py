"""All that importing the package changes in timm, and how to undo it.

Examples:
    >>> unregister()
    []
    >>> "dm_nf_resnet50" in timm.list_models()
    False
    >>> register()
    >>> "dm_nf_resnet50" in timm.list_models()
    True
"""

from . import optim
from .models.nfnets import register_networks, unregister_networks
from .optim.factory import warn_of

__all__ = ["register", "unregister"]


def register() -> None:
    """Give timm our networks, optimizers and clipping function, as importing the package does. Safe to repeat."""
    register_networks()
    optim.register()


def unregister() -> list[str]:
    """Make timm what it was before the package was imported. Networks and optimizers that exist go on working.

    Returns:
        What stays, as somebody else has put something in its place since, for example `timm.utils.adaptive_clip_grad`.
        A warning names it too.
    """
    left = unregister_networks()
    warn_of(left)
    return left + optim.unregister()

"""Whether networks and training step are the authors' on this machine."""

from .checks import run

__all__ = ["run"]

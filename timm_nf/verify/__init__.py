"""Compares the networks and the training step on this machine with the authors' numbers."""

from .checks import run

__all__ = ["run"]

"""Numbers about the signals of a network, and about what clipping would do to its gradients."""

from .clipping import agc_stats
from .signals import signal_stats

__all__ = ["agc_stats", "signal_stats"]

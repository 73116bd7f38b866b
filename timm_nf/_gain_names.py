"""The parameter names of gains: those of standardised convolutions, and the skip gains of blocks."""

__all__ = ["SKIP_GAIN", "is_gain"]

SKIP_GAIN = "skipinit_gain"
"""The name of a block's skip gain."""
_GAINS = ("gain", SKIP_GAIN)


def is_gain(name: str) -> bool:
    """Whether a parameter of this name is a gain or a skip gain.

    Examples:
        >>> is_gain("stages.0.0.conv1.gain"), is_gain("stages.0.0.conv1.weight")
        (True, False)
    """
    return name.rpartition(".")[2] in _GAINS

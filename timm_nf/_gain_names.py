"""What the gains of normalizer-free networks are called, here and in timm."""

GAIN_NAMES = ("gain", "skipinit_gain")  # of a standardised weight, of a residual branch

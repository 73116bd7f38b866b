"""Normalizer-free networks, exactly as in the paper, for timm."""

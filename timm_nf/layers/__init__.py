"""Layers of the normalizer-free networks. Each equals the authors' JAX layer up to rounding."""

from .activations import ACTIVATIONS, Activation, activation_gain, activation_name, create_activation
from .drop import StochasticDepth
from .pool2d_same import SameAvgPool2d, SameMaxPool2d
from .squeeze_excite import GateConv2d, SqueezeExcite
from .standardize import destandardize_weight, standardize_weight
from .std_conv import SameConv2d, ScaledStdConv2d

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "GateConv2d",
    "SameAvgPool2d",
    "SameConv2d",
    "SameMaxPool2d",
    "ScaledStdConv2d",
    "SqueezeExcite",
    "StochasticDepth",
    "activation_gain",
    "activation_name",
    "create_activation",
    "destandardize_weight",
    "standardize_weight",
]

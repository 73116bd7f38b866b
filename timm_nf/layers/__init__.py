"""Layers of the normalizer-free networks. Each equals the authors' JAX layer up to rounding."""

from .activations import ACTIVATIONS, Activation, activation_gain, activation_name, create_activation
from .drop import StochasticDepth
from .pool2d_same import SameAvgPool2d, SameMaxPool2d
from .residual import SkipInit
from .same_conv import SameConv1d, SameConv2d, SameConv3d
from .squeeze_excite import GateConv2d, SqueezeExcite
from .standardize import destandardize_weight, standardize_weight
from .std_conv import (
    ScaledStdConv1d,
    ScaledStdConv2d,
    ScaledStdConv3d,
    ScaledStdConvTranspose1d,
    ScaledStdConvTranspose2d,
    ScaledStdConvTranspose3d,
    ScaledStdLinear,
)

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "GateConv2d",
    "SameAvgPool2d",
    "SameConv1d",
    "SameConv2d",
    "SameConv3d",
    "SameMaxPool2d",
    "ScaledStdConv1d",
    "ScaledStdConv2d",
    "ScaledStdConv3d",
    "ScaledStdConvTranspose1d",
    "ScaledStdConvTranspose2d",
    "ScaledStdConvTranspose3d",
    "ScaledStdLinear",
    "SkipInit",
    "SqueezeExcite",
    "StochasticDepth",
    "activation_gain",
    "activation_name",
    "create_activation",
    "destandardize_weight",
    "standardize_weight",
]

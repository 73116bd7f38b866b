"""The authors' activations and their gamma.

timm's gelu is not the tanh form.

Sources: arXiv:2101.08692, section 4.3; deepmind-research nfnets/base.py at f5de0ede.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _identity(x: Tensor) -> Tensor:
    return x


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")  # jax.nn.gelu's default


def _gelu_(x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_(x, approximate="tanh")


def _silu_(x: Tensor) -> Tensor:
    return F.silu(x, inplace=True)


def _softplus(x: Tensor) -> Tensor:
    # above torch's default threshold of 20 the linear form is off by 2e-9, above 40 by less than float64 resolves
    return F.softplus(x, threshold=40)


# name -> (function, gamma): gamma = 1 / std(act(z)), z ~ N(0, 1), the values of nfnets/base.py as they stand there.
# tests/layers/test_layers.py::test_gamma_is_one_over_the_std_of_the_activated_normal re-derives them by quadrature.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "identity": (_identity, 1.0),
    "celu": (F.celu, 1.270926833152771),
    "elu": (F.elu, 1.2716004848480225),
    "gelu": (_gelu, 1.7015043497085571),
    "leaky_relu": (F.leaky_relu, 1.70590341091156),
    "log_sigmoid": (F.logsigmoid, 1.9193484783172607),
    "relu": (F.relu, 1.7139588594436646),
    "relu6": (F.relu6, 1.7131484746932983),
    "selu": (F.selu, 1.0008515119552612),
    "sigmoid": (torch.sigmoid, 4.803835391998291),
    "silu": (F.silu, 1.7881293296813965),
    "softplus": (_softplus, 1.9203323125839233),
    "softsign": (F.softsign, 2.338853120803833),
    "tanh": (torch.tanh, 1.5939117670059204),
}
# Those of the shipped networks where nobody needs the input afterwards: without a copy NFNet-F0's fused forward takes
# 3 % less time at batch 1 and 6 % less at batch 8 (benchmarks/inference.py times them).
_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {"gelu": _gelu_, "relu": F.relu_, "silu": _silu_}
_ACTIVATION_ALIASES = {"swish": "silu", "soft_sign": "softsign", "logsigmoid": "log_sigmoid"}


def activation_name(name: str) -> str:
    """The key of `name` in `ACTIVATIONS`.

    Raises:
        ValueError: if the authors give no gamma for an activation of this name.
    """
    key = _ACTIVATION_ALIASES.get(name, name) if isinstance(name, str) else name
    if key not in ACTIVATIONS:
        raise ValueError(
            f"act_layer must be the name of an activation with a known gamma, got {name!r}; "
            f"choose one of {', '.join(ACTIVATIONS)}"
        )
    return key


def activation_gain(name: str) -> float:
    """Gamma, the factor that gives the activation of a unit normal variance 1 (arXiv:2101.08692, section 4.3)."""
    return ACTIVATIONS[activation_name(name)][1]


class Activation(nn.Module):
    """An elementwise activation by name.

    Args:
        name: A key of `ACTIVATIONS`.
        gain: Factor on the output. Left at 1 wherever a convolution follows, which carries gamma in its weight.
        inplace: Overwrite the input where no gradients are recorded.
    """

    def __init__(self, name: str, gain: float = 1.0, inplace: bool = False) -> None:
        super().__init__()
        self.name = activation_name(name)
        self.function = ACTIVATIONS[self.name][0]  # an attribute, as TorchScript cannot look it up in the table
        self.inplace_function = _IN_PLACE.get(self.name, self.function) if inplace else self.function
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        x = self.function(x) if torch.is_grad_enabled() else self.inplace_function(x)
        return x if self.gain == 1.0 else x * self.gain

    def extra_repr(self) -> str:
        return self.name if self.gain == 1.0 else f"{self.name}, gain={self.gain:.4f}"

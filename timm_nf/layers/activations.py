"""The authors' activations, each with its gamma.

timm's `gelu` is the exact form; the authors' is the tanh form.

Sources: arXiv:2101.08692, section 4.3; deepmind-research nfnets/base.py at f5de0ede.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "Activation", "activation_gain", "activation_name", "create_activation"]

# name -> (torch's module, gamma), with gamma = 1 / std(act(z)) for z ~ N(0, 1). The values are from nfnets/base.py.
# tests/layers/test_layers.py::test_gamma_is_one_over_the_std_of_the_activated_normal computes them by quadrature.
ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "identity": (nn.Identity, 1.0),
    "celu": (nn.CELU, 1.270926833152771),
    "elu": (nn.ELU, 1.2716004848480225),
    "gelu": (partial(nn.GELU, approximate="tanh"), 1.7015043497085571),  # jax.nn.gelu's default
    "leaky_relu": (nn.LeakyReLU, 1.70590341091156),
    "log_sigmoid": (nn.LogSigmoid, 1.9193484783172607),
    "relu": (nn.ReLU, 1.7139588594436646),
    "relu6": (nn.ReLU6, 1.7131484746932983),
    "selu": (nn.SELU, 1.0008515119552612),
    "sigmoid": (nn.Sigmoid, 4.803835391998291),
    "silu": (nn.SiLU, 1.7881293296813965),
    # torch replaces softplus by the identity above a threshold. The error is 2e-9 at the default threshold of 20, and
    # below float64's resolution at 40.
    "softplus": (partial(nn.Softplus, threshold=40), 1.9203323125839233),
    "softsign": (nn.Softsign, 2.338853120803833),
    "tanh": (nn.Tanh, 1.5939117670059204),
}
"""For each name of an activation: its module, and the gamma that gives its output unit variance."""
_ALIASES = {"swish": "silu", "soft_sign": "softsign", "logsigmoid": "log_sigmoid"}
# The authors' table has these two as well. They mix channels, so they do not fit into these networks.
_NOT_BUILT = ("glu", "log_softmax")


def activation_name(name: str) -> str:
    """The key in `ACTIVATIONS` of an activation's name.

    Examples:
        >>> activation_name("swish")
        'silu'

    Raises:
        ValueError: if the authors give no gamma for this activation, or it is not elementwise.
    """
    key: object = _ALIASES.get(name, name) if isinstance(name, str) else name  # pyright: ignore[reportUnnecessaryIsInstance]
    if key in ACTIVATIONS:
        return key
    choices = f"choose one of {', '.join(ACTIVATIONS)}"
    if key in _NOT_BUILT:
        raise ValueError(
            f"act_layer {name!r} is in the authors' table but not built here: it is not elementwise; {choices}"
        )
    raise ValueError(f"act_layer must be the name of an activation with a known gamma, got {name!r}; {choices}")


def activation_gain(name: str) -> float:
    """Gamma: the activation of a unit normal times gamma has variance 1 (arXiv:2101.08692, section 4.3).

    Examples:
        >>> round(activation_gain("relu"), 4)
        1.714
    """
    return ACTIVATIONS[activation_name(name)][1]


def create_activation(name: str) -> nn.Module:
    """Build the activation as torch's own module, because tools look for these types.

    The module does not apply gamma. The next convolution has gamma in its weight.

    Examples:
        >>> create_activation("gelu")
        GELU(approximate='tanh')
    """
    return ACTIVATIONS[activation_name(name)][0]()


class Activation(nn.Module):
    """An activation times its gamma, for places where no convolution follows.

    Args:
        name: A key of `ACTIVATIONS` or an alias of one.
        gain: Factor on the output. By default it is gamma.

    Examples:
        >>> Activation("relu")(torch.tensor([-1.0, 1.0]))
        tensor([0.0000, 1.7140])
    """

    def __init__(self, name: str, gain: float | None = None) -> None:
        super().__init__()
        self.act = create_activation(name)
        self.gain = activation_gain(name) if gain is None else gain

    def forward(self, x: Tensor) -> Tensor:
        """(...) -> (...), any shape."""
        return self.act(x) * self.gain

    def extra_repr(self) -> str:
        return f"gain={self.gain:.4f}"

"""What a unit of a parameter is: an output channel, a row, or the whole parameter.

A `clip_axis` is the axis of a parameter's output units. It is 0 for linear layers and convolutions, 1 for transformers'
`Conv1D`, and `(1, groups)` for transposed convolutions, whose weights are (in, out / groups, K, K).
"""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

__all__ = ["Axis", "unit_axes"]

Axis = int | tuple[int, int]
"""The axis of a weight's output units; `(axis, groups)` for grouped transposed convolutions."""


class Layout(NamedTuple):
    """How the entries of a tensor are divided into units.

    Attributes:
        kept: The axes that remain when the norm of every unit is taken. Without any, the whole tensor is one unit.
        blocks: Into how many blocks the first axis is cut before that; 0 for no cut.
    """

    kept: tuple[int, ...] = ()
    blocks: int = 0

    def is_single(self) -> bool:  # no property, which torch.compile does not know on torch 2.8
        """Whether the whole tensor is one unit."""
        return not self.kept

    def view(self, x: Tensor) -> Tensor:
        """The same memory with the first axis cut into its blocks."""
        return x.view(self.blocks, x.shape[0] // self.blocks, *x.shape[1:]) if self.blocks else x

    def reduced(self, ndim: int) -> tuple[int, ...]:
        """The axes of the view over which the norm of a unit is taken."""
        return tuple(axis for axis in range(ndim) if axis not in self.kept)

    def sizes(self, view: Tensor) -> list[int]:
        """The shape of one factor per unit, which broadcasts to the view: all other axes are 1."""
        return [n if axis in self.kept else 1 for axis, n in enumerate(view.shape)]

    def count(self, view: Tensor) -> int:
        """How many units the view has."""
        return prod([view.shape[axis] for axis in self.kept])  # a list, which torch.compile knows


SINGLE = Layout()
ROWS = Layout((0,))


def is_single_unit(shape: Sequence[int]) -> bool:
    """Whether all entries are one unit by the paper's rule: at most one axis is longer than 1."""
    return sum(n > 1 for n in shape) <= 1


def layout_of(shape: Sequence[int], axis: Axis) -> Layout:
    """The layout of a whole tensor that has no `axis_problem`."""
    if is_single_unit(shape):
        return SINGLE
    if isinstance(axis, tuple):
        return Layout((0, 2), axis[1]) if axis[1] > 1 else Layout((1,))
    return ROWS if axis == 0 else Layout((axis % len(shape),))


def axis_problem(shape: Sequence[int], axis: Axis) -> str | None:
    """Why the output units of such a tensor cannot lie on this axis; None if they can."""
    if is_single_unit(shape):
        return None
    if isinstance(axis, tuple):
        if shape[0] % axis[1]:
            return f"clip_axis {axis}, but its first axis does not divide into {axis[1]} groups"
    elif not -len(shape) <= axis < len(shape):
        return f"clip_axis {axis}, but only {len(shape)} axes"
    return None


def checked_axis(value: Any) -> Axis:
    """The value as an axis.

    Raises:
        ValueError: if it is neither a whole number nor (1, groups).
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, (tuple, list)):
        pair = cast(Sequence[Any], value)
        if len(pair) == 2 and pair[0] == 1 and type(pair[0]) is type(pair[1]) is int and pair[1] >= 1:
            return (1, pair[1])
    raise ValueError(f"clip_axis must be an axis or (1, groups) as of a transposed convolution, got {value!r}")


def unit_axes(model: nn.Module) -> dict[int, Axis]:
    """The axis of every parameter whose output units do not lie on axis 0, by the parameter's id.

    These are the weights of transposed convolutions and of transformers' `Conv1D`, also behind `weight_norm`,
    `spectral_norm` and other parametrizations that keep the weight's shape.

    Examples:
        >>> layer = torch.nn.ConvTranspose2d(8, 6, 3, groups=2)
        >>> unit_axes(layer)[id(layer.weight)]
        (1, 2)
    """
    axes: dict[int, Axis] = {}
    for module in model.modules():
        axis = _module_axis(module)
        if axis != 0:
            for p in weights_behind(module):
                if axis_problem(p.shape, axis) is None:  # a parametrization may make the weight of another shape
                    axes.setdefault(id(p), axis)
    return axes


def weights_behind(module: nn.Module, name: str = "weight") -> list[nn.Parameter]:
    """The parameters that a layer's weight is computed from.

    Returns:
        `weight` itself; `weight_g`, `weight_v` or `weight_orig` of torch's older `weight_norm` and `spectral_norm`; or
        everything in `parametrizations.weight`. Empty if the layer has none of them.
    """
    own = dict(module.named_parameters(recurse=False))
    if name in own:
        return [own[name]]
    parametrizations = getattr(module, "parametrizations", None)
    if isinstance(parametrizations, nn.ModuleDict) and name in parametrizations:
        return list(parametrizations[name].parameters())
    if not hasattr(module, name):
        return []
    return [p for own_name, p in own.items() if own_name.startswith(f"{name}_")]


def _module_axis(module: nn.Module) -> Axis:
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return (1, module.groups) if module.groups > 1 else 1
    # The class is told by its name: transformers need not be installed.
    bases = type(module).__mro__
    return int(any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in bases))

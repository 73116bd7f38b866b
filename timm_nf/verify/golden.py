"""The authors' numbers, and the synthetic parameters and images that they belong to."""

# torch types from_numpy in part.
# pyright: reportUnknownMemberType=false

import importlib.resources
from typing import Any
from zlib import crc32

import numpy as np
import timm
import torch
from torch import Tensor, nn

from .. import convert

__all__ = ["fill", "golden_model", "golden_params", "image", "load_golden"]


def fill(shape: tuple[int, ...], module: str, name: str) -> np.ndarray:
    """The synthetic value of one of the authors' parameters, float64: a function of its names and shape alone.

    Args:
        shape: In the authors' layout, say (3, 3, 128, 256).
        module: Say `NFNet/~/nf_block_3/~/conv1`.
        name: w, gain, bias, b or skip_gain.

    Raises:
        KeyError: for any other name.
    """
    # numpy promises that this legacy stream never changes
    noise = np.random.RandomState(crc32(f"{module}/{name}".encode()) % 2**31).standard_normal(shape)
    if name == "w":  # variance 1 / fan-in; convolutions have a mean that standardising has to take out
        return noise / np.prod(shape[:-1]) ** 0.5 + (0.01 if len(shape) == 4 else 0.0)
    mean, std = {"gain": (1.0, 0.1), "bias": (0.0, 0.1), "b": (0.0, 0.1), "skip_gain": (0.7, 0.1)}[name]
    return np.asarray(mean + std * noise)


def image(n: int, h: int, w: int) -> Tensor:
    """The synthetic input batch (n, 3, h, w), float64."""
    noise = np.random.RandomState(1234 + 7 * n + 31 * h + w).standard_normal((n, h, w, 3))
    return torch.from_numpy(noise).permute(0, 3, 1, 2).contiguous()


def golden_params(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The synthetic float64 parameters for a network of any variant, config and number of classes.

    Args:
        state_dict: Of the network; only names and shapes count.
    """
    tree = convert.timm_to_haiku(state_dict)
    return convert.haiku_to_timm(
        {
            module: {name: fill(array.shape, module, name) for name, array in arrays.items()}
            for module, arrays in tree.items()
        }
    )


def golden_model(name: str, **kwargs: Any) -> nn.Module:
    """The network with the synthetic parameters, in float64 and evaluation mode; arguments as `timm.create_model`'s."""
    # On the meta device first: values that are overwritten need no initialisation.
    model = timm.create_model(name, device="meta", dtype=torch.float64, **kwargs).to_empty(device="cpu")
    model.load_state_dict(golden_params(model.state_dict()))
    return model.eval()


def load_golden(file: str) -> dict[str, np.ndarray]:
    """One of the shipped golden files, by its name without the ending."""
    with (
        (importlib.resources.files("timm_nf.verify") / "golden" / f"{file}.npz").open("rb") as stream,
        np.load(stream) as npz,
    ):
        return dict(npz)

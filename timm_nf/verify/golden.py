"""The authors' golden numbers, and the synthetic parameters and images that they were computed from.

Examples:
    >>> fill((3, 3, 8, 16), "NFNet/~/nf_block_0/~/conv1", "w").shape
    (3, 3, 8, 16)
    >>> model = golden_model("nfnet_f0", depths=(1,), channels=(16,), group_size=8)
    >>> params = golden_params(model.state_dict())
    >>> torch.equal(params["stem.conv1.bias"], model.stem.conv1.bias)
    True
    >>> model(image(1, 32, 32)).dtype
    torch.float64
    >>> load_golden("nfnet_F0_1x64x64")["logits"].shape
    (1, 1000)
"""

# torch's types of from_numpy are incomplete.
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
    """The synthetic value of one parameter, in float64. It depends only on the names and the shape.

    Args:
        shape: The parameter's shape in the authors' layout, such as (3, 3, 128, 256).
        module: The authors' name of its module, such as `NFNet/~/nf_block_3/~/conv1`.
        name: `w`, `gain`, `bias`, `b` or `skip_gain`.

    Raises:
        KeyError: for any other name.
    """
    # NEP 19: numpy never changes the stream of RandomState.
    noise = np.random.RandomState(crc32(f"{module}/{name}".encode()) % 2**31).standard_normal(shape)
    if name == "w":
        mean = 0.01 if len(shape) == 4 else 0.0  # convolutions have a mean, so that standardisation must remove it
        return noise / np.prod(shape[:-1]) ** 0.5 + mean  # variance 1 / fan-in
    mean, std = {"gain": (1.0, 0.1), "bias": (0.0, 0.1), "b": (0.0, 0.1), "skip_gain": (0.7, 0.1)}[name]
    return np.asarray(mean + std * noise)


def image(n: int, h: int, w: int) -> Tensor:
    """The synthetic input batch (n, 3, h, w), float64."""
    noise = np.random.RandomState(1234 + 7 * n + 31 * h + w).standard_normal((n, h, w, 3))
    return torch.from_numpy(noise).permute(0, 3, 1, 2).contiguous()


def golden_params(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The synthetic float64 parameters of a network of any variant, configuration and number of classes.

    Args:
        state_dict: The network's state dict. Only its names and shapes are used.

    Returns:
        A state dict with the same names and shapes.
    """
    tree = convert.timm_to_haiku(state_dict)
    return convert.haiku_to_timm(
        {
            module: {name: fill(array.shape, module, name) for name, array in arrays.items()}
            for module, arrays in tree.items()
        }
    )


def golden_model(name: str, **kwargs: Any) -> nn.Module:
    """The network with the synthetic parameters, in float64 and evaluation mode.

    Args:
        name: A network of this package.
        **kwargs: Arguments of `timm.create_model`.
    """
    # It is built on the meta device, to save the initialisation of values that are overwritten.
    model = timm.create_model(name, device="meta", dtype=torch.float64, **kwargs).to_empty(device="cpu")
    model.load_state_dict(golden_params(model.state_dict()))
    return model.eval()


def load_golden(file: str) -> dict[str, np.ndarray]:
    """The arrays of a shipped golden file. `file` is its name without `.npz`."""
    with (
        (importlib.resources.files("timm_nf.verify") / "golden" / f"{file}.npz").open("rb") as stream,
        np.load(stream) as npz,
    ):
        return dict(npz)

"""Networks by name: which names there are, and the network with the weights that a name or a file has."""

# timm, onnx and onnxruntime have no types or partial ones.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateImportUsage=false, reportMissingTypeStubs=false

from pathlib import Path

import timm
from timm.models import is_model
from torch import nn

from .._seed import seeded
from .._text import reason
from ..checkpoint import Checkpoint, fill

__all__ = ["is_known", "load_model", "random_model", "timm_name"]


def is_known(name: str) -> bool:
    """Whether timm would know what to build: a registered name, with or without a tag, or a place of weights."""
    return ":" in name or is_model(name.partition(".")[0])


def timm_name(name: str) -> str:
    """As timm names it: a folder in Hub layout is `local-dir:` and its path."""
    return f"local-dir:{name}" if Path(name).is_dir() else name


def load_model(name: str, checkpoint: Checkpoint | None = None) -> nn.Module:
    """The network with its weights, in float32 and in evaluation mode.

    Args:
        name: As `timm.create_model` takes it: a name with a tag of weights, `hf-hub:user/repo` or `local-dir:folder`;
            or the folder alone.
        checkpoint: Weights to load instead of the published ones, with the classes, arguments and preprocessing that
            they were trained with.

    Raises:
        ValueError: if the checkpoint is another network's.
        RuntimeError: if there are no weights of this name, or they cannot be had, with what to do.
    """
    if checkpoint is not None:
        return fill(timm_name(name), checkpoint).float()
    try:
        return timm.create_model(timm_name(name), pretrained=True).eval()
    except Exception as error:  # the Hub client, its HTTP library and timm each raise their own kinds
        raise RuntimeError(
            f"could not load {name} with its published weights ({reason(error)}); `timm-nf list` shows what has "
            "weights, downloads need a network; local weights are loaded by --checkpoint FILE, where a command has it, "
            "or as a folder in Hub layout"
        ) from error


def random_model(name: str) -> nn.Module:
    """The network of a registered name with random weights, always the same, in evaluation mode.

    What starts at 0, as skip gains, biases and some classifiers do, is random as well: every layer shows in the logits.
    """
    with seeded(0):
        model = timm.create_model(name.partition(".")[0])
        for p in model.parameters():
            if not p.any():
                nn.init.normal_(p, std=0.1)
    return model.eval()

"""Creates networks by name, with weights from the Hub, from a file, or random ones."""

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
    """Whether timm can build this: a registered name with or without a tag, or a source such as `hf-hub:user/repo`."""
    return ":" in name or is_model(name.partition(".")[0])


def timm_name(name: str) -> str:
    """The name that timm expects. For a folder it is `local-dir:` and the path."""
    return f"local-dir:{name}" if Path(name).is_dir() else name


def load_model(name: str, checkpoint: Checkpoint | None = None) -> nn.Module:
    """Create a network with its weights, in float32 and evaluation mode.

    Args:
        name: A name for `timm.create_model` (with a tag of weights, `hf-hub:user/repo` or `local-dir:folder`), or the
            path of a folder.
        checkpoint: Weights to load instead of the published ones. Classes, arguments and preprocessing come from it
            too.

    Raises:
        ValueError: if the checkpoint belongs to another network.
        RuntimeError: if there are no published weights, or they cannot be loaded. The message says what to do.
    """
    if checkpoint is not None:
        return fill(timm_name(name), checkpoint).float()
    try:
        return timm.create_model(timm_name(name), pretrained=True).eval()
    except Exception as error:  # the Hub client, its HTTP library and timm have no common type of error
        raise RuntimeError(
            f"could not load {name} with its published weights ({reason(error)}). `timm-nf list` shows which networks "
            "have weights. Downloads need a network. For local weights give --checkpoint FILE, if the command has this "
            "option, or the path of a folder in Hub layout"
        ) from error


def random_model(name: str) -> nn.Module:
    """Create a network with random weights, the same in every call, in evaluation mode.

    Parameters that start at 0 (skip gains, biases, some classifiers) are random too, so that the logits depend on every
    layer.
    """
    with seeded(0):
        model = timm.create_model(name.partition(".")[0])
        for p in model.parameters():
            if not p.any():
                nn.init.normal_(p, std=0.1)
    return model.eval()

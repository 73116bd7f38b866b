"""What several tests share: small networks, the reference, the stand-in Hub, files in the authors' form."""

from pathlib import Path

import timm
import torch
from torch.torch_version import TorchVersion

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
SHIPPED = ROOT / "timm_nf" / "verify" / "golden"
OLD_TORCH = TorchVersion(torch.__version__) < "2.9"
"""Whether torch lacks what some tests need. They then hold what it does instead; docs/compatibility.md has a list."""
OLD_TIMM = not hasattr(timm.models, "get_model_args")
"""Whether timm is below 1.0.31. Its factory then records no arguments, among other things on the same list."""


def golden_file(name: str) -> Path:
    """One of the authors' files of numbers, by its name without the ending: the package has four, the tests the others.

    A file that is in neither folder is looked for in the tests', so that opening it fails.
    """
    shipped = SHIPPED / f"{name}.npz"
    return shipped if shipped.exists() else GOLDEN / f"{name}.npz"

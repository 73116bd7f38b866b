"""Writes the authors' checkpoints as folders for the Hub and timm, and finds every array again in the file.

Examples:
    >>> import pickle
    >>> model = timm.create_model(
    ...     "nfnet_f0", depths=(1, 1, 1, 1), channels=(16, 16, 32, 32), group_size=8, num_classes=3
    ... )
    >>> with open("net.npz", "wb") as file:  # the authors' files are pickles, too
    ...     pickle.dump(timm_nf.convert.timm_to_haiku(model.state_dict()), file)
    >>> converted = convert("net.npz", "folder")
    >>> isinstance(converted, Converted), converted.name, converted.overrides["channels"]
    (True, 'nfnet_f0', (16, 16, 32, 32))
"""

# torch types only a part of what it exports.
# pyright: reportUnknownMemberType=false

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._dtypes import dtype_name
from ..checkpoint import assign, load_tensors, skeleton
from ..convert.haiku import haiku_to_timm, timm_to_haiku
from ..convert.haiku_pickle import load_haiku
from ..convert.infer import infer_variant
from .client import require_hub, upload
from .errors import explained
from .folder import WEIGHTS, Written, write_folder

__all__ = ["Converted", "convert"]


@dataclass(frozen=True)
class Converted:
    """The network that `convert` found in a checkpoint, and the folder that it wrote.

    Attributes:
        name: The variant, as `timm.create_model` takes it.
        overrides: Arguments that give the variant the checkpoint's shapes.
        parameters: Number of the network's parameters.
        written: The files, and what was compared.
    """

    name: str
    overrides: dict[str, Any]
    parameters: int
    written: Written


def convert(
    file: str | Path,
    folder: str | Path,
    *,
    license: str | None = None,
    dtype: torch.dtype | None = None,
    repo_id: str | None = None,
) -> Converted:
    """Write one of the authors' checkpoints as a Hub folder, read it back, and publish it if asked to.

    Args:
        file: A file for `convert.load_haiku`.
        folder: A new or an empty folder. After any error it is as before.
        license: License of the weights. It is never guessed. Without it there is no README.md.
        dtype: Dtype to round weights to. By default they keep the file's.
        repo_id: `user/name`. One commit publishes the folder there.

    Raises:
        ValueError: if the file is no such checkpoint, or the folder is not empty.
        RuntimeError: if the folder does not hold the checkpoint's numbers.
        hub.HubError: if the Hub, the network or the disk does not allow it. The message says what to do.
    """
    folder = Path(folder)
    _require_new_or_empty(folder)
    if repo_id is not None:
        require_hub(repo_id, None)
    params = load_haiku(file)
    name, overrides = infer_variant(params)
    network = skeleton(name, **overrides)
    assign(network, haiku_to_timm(params), str(file))
    card = None if license is None else {"license": license}
    with _undone_after_errors(folder):
        with explained(repo_id or "", None, None):
            written = write_folder(network, folder, card=card, dtype=dtype, repo_id=repo_id)
        found = _compare_arrays(params, load_tensors(folder / WEIGHTS), dtype)
        written = replace(written, checks=[("arrays of the checkpoint in the file", found), *written.checks])
        if repo_id is not None:
            written = upload(folder, written, repo_id)
    return Converted(name, overrides, sum(p.numel() for p in network.parameters()), written)


def _require_new_or_empty(folder: Path) -> None:
    is_new = not folder.exists() and not folder.is_symlink()
    is_empty = folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())
    if not (is_new or is_empty):
        raise ValueError(f"expected a new or empty folder to write to, {folder} is there: remove it or name another")


@contextmanager
def _undone_after_errors(folder: Path) -> Generator[None]:
    """Empty a folder if something is raised, and remove it if it was not there before."""
    was_there = folder.is_dir()
    try:
        yield
    except BaseException:
        if folder.is_dir():
            for file in folder.iterdir():
                file.unlink()
            if not was_there:
                folder.rmdir()
        raise


def _compare_arrays(
    params: Mapping[str, Mapping[str, np.ndarray]], tensors: Mapping[str, Tensor], dtype: torch.dtype | None
) -> str:
    """Convert the written tensors back, and compare them with the arrays of the checkpoint.

    Args:
        params: The arrays of the checkpoint.
        tensors: The tensors of the written file.
        dtype: The dtype to which they were rounded, if they were.

    Returns:
        The result in words.

    Raises:
        RuntimeError: if an array differs in a bit.
    """
    # numpy has no bfloat16. float32 holds its values.
    wide = {k: v.float() if v.dtype == torch.bfloat16 else v for k, v in tensors.items()}
    back = timm_to_haiku(wide)
    total = 0
    wrong: list[str] = []
    for module, entries in params.items():
        for name, array in entries.items():
            got = back[module][name]
            if dtype is not None:
                array = torch.from_numpy(np.array(array)).to(dtype).to(torch.from_numpy(got).dtype).numpy()
            total += 1
            if got.dtype != array.dtype or got.shape != array.shape or got.tobytes() != array.tobytes():
                wrong.append(f"{module}/{name}")
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {total} arrays are not in the file as they were, say {wrong[0]}")
    rounded = f" when rounded to {dtype_name(dtype)}" if dtype else ""
    return f"{total} of {total} equal{rounded}, bit for bit"

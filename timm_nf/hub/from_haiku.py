"""The authors' checkpoints as folders for the Hub and timm. Every array is found again in the written file.

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

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
        name: Of the variant, as `timm.create_model` takes it.
        overrides: Arguments that give the variant the checkpoint's shapes.
        parameters: Their number.
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
        file: For `convert.load_haiku`.
        folder: A new or an empty one. After any error it is as before.
        license: Of the weights, never guessed. Without one there is no README.md.
        dtype: Round weights to it; by default they keep the file's.
        repo_id: `user/name`, where one commit publishes the folder.

    Raises:
        ValueError: if the file is no such checkpoint, or the folder is not empty.
        RuntimeError: if the folder does not hold the checkpoint's numbers.
        hub.HubError: if the Hub, the network or the disk did not allow it; says what to do.
    """
    folder = Path(folder)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()) or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"expected a new or empty folder to write to, {folder} is there: remove it or name another")
    if repo_id is not None:
        require_hub(repo_id, None)
    was_there = folder.is_dir()
    params = load_haiku(file)
    name, overrides = infer_variant(params)
    network = skeleton(name, **overrides)
    assign(network, haiku_to_timm(params), str(file))
    card = {"license": license} if license is not None else None
    with explained(repo_id or "", None, None):
        written = write_folder(network, folder, card=card, dtype=dtype, repo_id=repo_id)
    try:
        found = _compare_arrays(params, load_tensors(folder / WEIGHTS), dtype)
        written = replace(written, checks=[("arrays of the checkpoint in the file", found), *written.checks])
        if repo_id is not None:
            written = upload(folder, written, repo_id)
    except BaseException:
        shutil.rmtree(folder)
        if was_there:
            folder.mkdir()
        raise
    return Converted(name, overrides, sum(p.numel() for p in network.parameters()), written)


def _compare_arrays(
    params: Mapping[str, Mapping[str, np.ndarray]], tensors: Mapping[str, Tensor], dtype: torch.dtype | None
) -> str:
    """Compare tensors, in the authors' layout again, with the arrays of their file.

    Args:
        params: Of the checkpoint.
        tensors: As read back.
        dtype: To which the tensors were rounded, if they were.

    Raises:
        RuntimeError: if an array differs in a bit.
    """
    # numpy has no bfloat16; float32 holds its values
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
    rounded = f" when rounded to {str(dtype).removeprefix('torch.')}" if dtype else ""
    return f"{total} of {total} equal{rounded}, bit for bit"

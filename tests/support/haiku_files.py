"""Checkpoints in the published form, written without jax, haiku and dill: their names are stand-ins while pickling."""

import pickle
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from timm_nf.convert.haiku_pickle import load_haiku

FORMS = ("plain", "flatmap", "jaxarrays", "dill")
SMALL = {
    "NFNet/~/nf_block": {"skip_gain": np.array(0.5, np.float32)},
    "NFNet/~/linear": {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float32)},
}
_NAMES = {
    "flatmap": ("haiku._src.data_structures", "FlatMapping"),
    "jaxarrays": ("jax._src.array", "_reconstruct_array"),
    "olderjax": ("jax._src.device_array", "reconstruct_device_array"),
    "dill": ("dill._dill", "_create_array"),
}


class Call:
    """Is pickled as a call of `function` with `arguments`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


@contextmanager
def name(module: str, attribute: str) -> Iterator[Any]:
    """A function that is pickled under this name, whether or not there is such a module."""

    def function() -> None: ...

    function.__module__, function.__name__, function.__qualname__ = module, attribute, attribute
    modules = {".".join(module.split(".")[: i + 1]): types.ModuleType("stand-in") for i in range(module.count(".") + 1)}
    setattr(modules[module], attribute, function)
    with mock.patch.dict(sys.modules, modules):
        yield function


def dumps(tree: Any, form: str = "plain", protocol: int = 4) -> bytes:
    """`tree` as the authors' tools write it."""
    if form == "plain":
        return pickle.dumps(tree, protocol)
    with name(*_NAMES[form]) as function:
        if form == "flatmap":
            tree = Call(function, {module: Call(function, entries) for module, entries in tree.items()})
        else:
            last = None if form == "dill" else {"weak_type": False}
            arrays = {m: {n: Call(function, *a.__reduce__(), last) for n, a in e.items()} for m, e in tree.items()}
            return pickle.dumps(arrays, protocol)
        return pickle.dumps(tree, protocol)


def loads(data: bytes, folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """What `load_haiku` reads in a file of `data`."""
    path = folder / "file.npz"
    path.write_bytes(data)
    return load_haiku(path)

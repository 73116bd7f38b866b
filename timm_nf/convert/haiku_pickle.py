"""Reads the authors' checkpoints, and runs no code that a file names.

The published files are pickles, and a pickle is a program. `pickle.load` imports and calls what it names. numpy's own
unpickling helpers can be abused too.

The machine below knows only the opcodes that a tree of arrays needs. `pickletools` decodes their binary arguments. A
name in the file becomes a member of an enumeration, so nothing is imported or called, and jax, haiku and dill are not
needed. An array is a view of bytes of the file, so no object takes more memory than its part of the file.

Examples:
    >>> import pickle
    >>> import numpy as np
    >>> with open("tree.npz", "wb") as file:
    ...     pickle.dump({"conv": {"w": np.ones((1, 1, 2, 3), np.float32)}}, file)
    >>> load_haiku("tree.npz")["conv"]["w"].shape
    (1, 1, 2, 3)
"""

# A value from a file can have any type.
# pyright: standard

import enum
import math
import os
import pickletools
from typing import Any, BinaryIO, cast

import numpy as np

__all__ = ["load_haiku"]


class _Name(enum.Enum):
    NDARRAY = enum.auto()
    DTYPE = enum.auto()
    RECONSTRUCT = enum.auto()
    FROMBUFFER = enum.auto()
    SCALAR = enum.auto()
    MAPPING = enum.auto()
    DILL_ARRAY = enum.auto()
    JAX_ARRAY = enum.auto()


# All names that a file may use. numpy 2 renamed numpy.core to numpy._core.
_NAMES = {
    "numpy ndarray": _Name.NDARRAY,
    "numpy dtype": _Name.DTYPE,
    "haiku._src.data_structures FlatMap": _Name.MAPPING,
    "haiku._src.data_structures FlatMapping": _Name.MAPPING,
    "haiku._src.data_structures frozendict": _Name.MAPPING,
    "dill._dill _create_array": _Name.DILL_ARRAY,
    "jax._src.array _reconstruct_array": _Name.JAX_ARRAY,
    "jax._src.device_array reconstruct_device_array": _Name.JAX_ARRAY,
}
for _core in ("core", "_core"):
    _NAMES |= {
        f"numpy.{_core}.multiarray _reconstruct": _Name.RECONSTRUCT,
        f"numpy.{_core}.multiarray scalar": _Name.SCALAR,
        f"numpy.{_core}.numeric _frombuffer": _Name.FROMBUFFER,
    }

_FILE_TYPES = {
    b"PK\x03\x04": "a zip archive, as np.savez and torch.save write it",
    b"\x93NUMPY": "a .npy file",
    b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.": "a file of an old torch.save",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip file",
    b"<": "a web page",
    b"version https://git-lfs": "a Git LFS pointer, the file itself was not downloaded",
}
_OPCODES = {opcode.code.encode("latin1"): opcode for opcode in pickletools.opcodes}
_ARGUMENTS = {"BININT", "BININT1", "BININT2", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
_ARGUMENTS |= {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_KNOWN = _ARGUMENTS | _CONSTANTS.keys() | _TUPLES.keys()
_KNOWN |= {"PROTO", "FRAME", "MARK", "TUPLE", "EMPTY_DICT", "SETITEM", "SETITEMS", "MEMOIZE", "BINPUT", "LONG_BINPUT"}
_KNOWN |= {"BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "STOP"}
_NAMING = {"INST", "PERSID", "EXT1", "EXT2", "EXT4"}  # refused; the message says which name they give
# Opcodes whose arguments are lines of text, and the number of lines. pickletools undoes escapes there, pickle does not.
_LINES = {"GLOBAL": 2, "INST": 2, "PERSID": 1}
_HINTS = {"ml_dtypes": "; store the parameters as float32", "_codecs": "; pickle it with protocol 3 or later"}
# A limit on memory: an opcode of 1 byte can make an object of 64. The largest tree has 50,000 opcodes, with jax arrays.
_MAX_OPCODES = 300_000


class _DType:
    def __init__(self, code: str) -> None:
        if code not in ("f2", "f4", "f8"):
            raise ValueError(f"expected arrays of float16, float32 or float64, got dtype {code[:20]!r}")
        self.dtype = np.dtype(code)


class _Array:
    """An array. `value` is None until the file gives its state."""

    def __init__(self, value: np.ndarray | None = None) -> None:
        self.value = value


class _Stream:
    """A file that never reads more bytes than are left, so that a false length allocates nothing."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self.tell = file.tell

    def left(self) -> int:
        return self.size - self.tell()

    def read(self, n: int) -> bytes:
        return self.file.read(min(n, self.left()))

    def line(self) -> str:
        line = self.file.readline()
        if not line.endswith(b"\n"):
            raise ValueError("it is truncated")
        return line[:-1].decode()


def _are_axes(values: Any) -> bool:
    return type(values) is tuple and len(values) <= 4 and all(type(n) is int for n in values)


def _view(dtype: _DType, shape: Any, data: bytes | bytearray, order: Any = "C", axes: Any = None) -> _Array:
    if not _are_axes(shape) or not all(0 < n <= len(data) for n in shape):
        raise ValueError("expected an array of at most four axes, none longer than its data or empty")
    if math.prod(shape) * dtype.dtype.itemsize != len(data):
        raise ValueError(f"expected an array of shape {shape} and type {dtype.dtype}, got {len(data)} bytes for it")
    flat = np.frombuffer(data, dtype.dtype)
    if order == "K" and _are_axes(axes) and sorted(axes) == list(range(len(shape))):
        return _Array(flat.reshape(shape).transpose(axes))
    if order not in ("C", "F") or axes is not None:
        raise ValueError("expected the order of an array's axes to be C, F, or K with a permutation")
    return _Array(flat.reshape(shape, order=order))


def _set_items(target: Any, items: list[Any]) -> None:
    # Messages print the keys, so they have to be short and printable.
    named = all(type(key) is str and len(key) <= 200 and key.isprintable() for key in items[::2])
    if type(target) is not dict or len(items) % 2 or not named:
        raise ValueError("expected a dict of names, got keys that are not strings or not printable, or no dict")
    target.update(zip(items[::2], items[1::2], strict=True))


def _set_state(target: Any, state: Any) -> None:
    match target, state:
        case _DType(), (3, "<" | ">" | "=" | "|" as order, None, None, None, -1, -1, 0):  # version, no fields, no flags
            target.dtype = target.dtype.newbyteorder(order)
        case _Array(), (1, shape, _DType() as dtype, bool(fortran), bytes() | bytearray() as data):
            target.value = _view(dtype, shape, data, "F" if fortran else "C").value
        case _:
            raise ValueError(f"BUILD on {_describe(target)} is refused, only the state of an array or a dtype is set")


def _call(function: Any, arguments: Any) -> Any:
    """The result of REDUCE. Only the calls that pickle an array, a scalar or one of the three wrappers are known."""
    match function, arguments:
        case _Name.DTYPE, (str(code), 0, 1):
            return _DType(code)
        case _Name.RECONSTRUCT, (_Name.NDARRAY, (0,), b"b"):
            return _Array()
        case _Name.FROMBUFFER, (bytes() | bytearray() as data, _DType() as dtype, shape, order, *axes) if len(axes) < 2:
            return _view(dtype, shape, data, order, *axes)
        case _Name.SCALAR, (_DType() as dtype, bytes(data)):
            return _view(dtype, (), data)
        case _Name.MAPPING, (dict() as mapping,):
            return mapping
        case (_Name.DILL_ARRAY, (_Name.RECONSTRUCT, inner, state) | (_Name.RECONSTRUCT, inner, state, None)) | (
            _Name.JAX_ARRAY,
            (_Name.RECONSTRUCT, inner, state, dict()),
        ):
            array = _call(_Name.RECONSTRUCT, inner)
            _set_state(array, state)
            return array
    raise ValueError(f"REDUCE of {_describe(function)} with such arguments is refused")


def _describe(value: Any) -> str:
    return value.name if isinstance(value, _Name) else type(value).__name__.strip("_")


def _lookup(module: Any, name: Any) -> _Name:
    found = _NAMES.get(f"{module} {name}") if isinstance(module, str) and isinstance(name, str) else None
    if found is None:
        shown = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "without a name"
        hint = _HINTS.get(module, "") if isinstance(module, str) else ""
        raise ValueError(
            f"the global {shown[:100]!r} is refused: a checkpoint has numpy arrays, dicts, haiku's FlatMap and jax "
            f"arrays, nothing else{hint}"
        )
    return found


def _next(stream: _Stream) -> tuple[str, Any]:
    """Read the next opcode and its argument.

    Raises:
        ValueError: if no tree of arrays needs this opcode.
    """
    position = stream.tell()
    code = stream.read(1)
    opcode = _OPCODES.get(code)
    if opcode is None:
        raise ValueError(f"there is no opcode {code!r} at byte {position}" if code else "it is truncated")
    argument: Any = None
    if opcode.name in _LINES:
        argument = " ".join(stream.line() for _ in range(_LINES[opcode.name]))
    elif opcode.arg and (opcode.name in _KNOWN or opcode.name in _NAMING):
        argument = opcode.arg.reader(cast(BinaryIO, stream))
    if opcode.name not in _KNOWN:
        shown = "" if argument is None else f" {str(argument)[:100]!r}"
        raise ValueError(f"the opcode {opcode.name}{shown} at byte {position} is refused, no tree of arrays needs it")
    if opcode.name == "PROTO" and argument > 5:
        raise ValueError(f"expected pickle protocol 3, 4 or 5, got {argument}")
    if opcode.name == "FRAME" and argument > stream.left():
        raise ValueError(f"expected a frame of {argument} bytes at byte {position}, {stream.left()} are left")
    return opcode.name, argument


def _run(stream: _Stream) -> Any:
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks under each mark
    memo: dict[int, Any] = {}

    for _ in range(_MAX_OPCODES):
        op, argument = _next(stream)
        if op in _ARGUMENTS:
            stack.append(argument)
        elif op in _CONSTANTS:
            stack.append(_CONSTANTS[op])
        elif op == "MARK":
            below.append(stack)
            stack = []
        elif op == "TUPLE":
            items, stack = tuple(stack), below.pop()
            stack.append(items)
        elif op in _TUPLES:
            items = [stack.pop() for _ in range(_TUPLES[op])]
            stack.append(tuple(reversed(items)))
        elif op == "EMPTY_DICT":
            stack.append({})
        elif op == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _set_items(stack[-1], [key, value])
        elif op == "SETITEMS":
            items, stack = stack, below.pop()
            _set_items(stack[-1], items)
        elif op in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if op == "MEMOIZE" else argument] = stack[-1]
        elif op in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif op == "GLOBAL":
            stack.append(_lookup(*argument.split(" ", 1)))
        elif op == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            stack.append(_lookup(module, name))
        elif op == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_call(function, arguments))
        elif op == "BUILD":
            state = stack.pop()
            _set_state(stack[-1], state)
        elif op == "STOP":
            if below or len(stack) != 1:
                raise ValueError("expected one value at its end, got more or none")
            return stack[0]
    raise ValueError(f"expected at most {_MAX_OPCODES} opcodes, got more: this is not one network's parameters")


def _tree(value: Any, size: int) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of a tree with exactly two levels. Cycles have more, and are refused."""
    if type(value) is not dict or not all(type(entries) is dict for entries in value.values()):
        raise ValueError("expected a tree {module: {name: array}}, got something else")
    arrays: dict[str, dict[str, np.ndarray]] = {}
    for module, entries in value.items():
        arrays[module] = {}
        for name, entry in entries.items():
            where = f"{module}/{name}"
            if type(entry) is not _Array or entry.value is None:
                raise ValueError(f"expected an array as {where!r}, got {_describe(entry)} without data")
            array = entry.value
            if (size := size - array.nbytes) < 0:
                raise ValueError(f"expected every array in the file once, got more data than that, at {where!r}")
            if not np.isfinite(array).all():
                raise ValueError(f"expected finite weights, got NaN or infinite ones in {where!r}")
            arrays[module][name] = array.astype(array.dtype.newbyteorder("="), copy=False)
    return arrays


def _other_file_type(head: bytes) -> str | None:
    """The type of a file with these first bytes, None for a pickle or an unknown type."""
    if not head:
        return "empty"
    if head[8:10] == b'{"':
        return "a safetensors file"
    return next((name for magic, name in _FILE_TYPES.items() if head.startswith(magic)), None)


def load_haiku(path: str | os.PathLike[str]) -> dict[str, dict[str, np.ndarray]]:
    """Read the parameter tree in one of the authors' checkpoints. No code in the file runs.

    Args:
        path: A pickle of protocol 3 or later that holds dicts or haiku FlatMaps of numpy or jax arrays. The authors'
            files are pickles although their names end in .npz.

    Returns:
        `{module: {name: array}}`, with float16, float32 or float64 arrays in native byte order. Most arrays are
        read-only views. Together they take no more memory than the file.

    Raises:
        ValueError: if the file is not such a pickle, is damaged, or holds NaN or infinite weights. The message is one
            line.
        OSError: if the file cannot be read.
    """
    with open(path, "rb") as file:
        head = file.read(32)
        file.seek(0)
        if other := _other_file_type(head):
            raise ValueError(f"{path}: expected the authors' checkpoint, a pickle, but the file is {other}")
        stream = _Stream(file)
        try:
            return _tree(_run(stream), stream.size)
        except (ValueError, IndexError, KeyError) as error:
            if isinstance(error, ValueError):  # ours or pickletools'
                reason = " ".join(str(error).split())[:400]
            else:  # an empty stack, or a place of the memo that has no value
                reason = f"the pickle is broken at byte {stream.tell()}"
            raise ValueError(f"{path}: expected the authors' checkpoint, a pickled parameter tree; {reason}") from None

"""Writes networks for other run times: ONNX, torch.export programs, TorchScript. Reloads and compares every file.

Fuse a network first (`timm_nf.fuse`). The file then holds plain convolutions. Otherwise exporters keep the arithmetic
of standardised weights, and every inference repeats it.

Examples:
    >>> from pathlib import Path
    >>> model = timm.create_model("nfnet_f0", depths=(1,), channels=(16,), group_size=8, num_classes=3).eval()
    >>> checks = write(timm_nf.fuse(model), Path("net.ts"), size=32)
    >>> isinstance(checks[0], FileCheck), all(check.ok for check in checks)
    (True, True)
    >>> onnx_is_installed()
    True
"""

# timm, onnx and onnxruntime have no types, or incomplete ones.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateImportUsage=false, reportMissingTypeStubs=false

import copy
import inspect
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from .._relative_error import relative_error
from .._temporary import replacing
from .._text import counted, install_hint, reason
from .classify import labels
from .images import photographs
from .named import is_known

__all__ = ["BOUNDS", "SUFFIXES", "FileCheck", "is_known", "onnx_is_installed", "photographs", "write"]

# A relative L2 error of the logits below it is rounding: another order of summation, or a few roundings to half.
BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""The largest relative L2 error of the logits with which an exported file is accepted, by dtype."""
SUFFIXES = {".onnx": "ONNX", ".pt2": "torch.export program", ".ts": "TorchScript"}
"""The formats that `write` knows, by the suffix of the file."""
# Nodes that standardised weights or batch normalisation leave in a graph. Networks may have other normalisations.
_FORBIDDEN = ("BatchNormalization", "InstanceNormalization")

# Conditions on sizes that cannot be proved become checks at run time, where torch.export has this option.
_DEFERRED: dict[str, Any] = dict.fromkeys(
    {"prefer_deferred_runtime_asserts_over_guards"} & inspect.signature(torch.export.export).parameters.keys(), True
)

_Dims = dict[int, Any] | None  # the images' {axis: Dim} for torch.export; None if no axis may vary


class FileCheck(NamedTuple):
    """One check of the file after it was read back.

    Attributes:
        name: What was checked, in words.
        measured: What was found, in words.
        ok: Whether the check passed.
    """

    name: str
    measured: str
    ok: bool


class _ReadBack(NamedTuple):
    """The network in a file that was just written."""

    logits: Callable[[Tensor], Tensor]
    checks: list[FileCheck]


def onnx_is_installed() -> bool:
    """Whether all packages for writing, checking and running ONNX files can be imported."""
    return all(find_spec(package) for package in ("onnx", "onnxscript", "onnxruntime"))


def write(
    model: nn.Module,
    file: Path,
    *,
    size: int | None = None,
    dynamic_batch: bool = False,
    dynamic_size: bool = False,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> list[FileCheck]:
    """Write a model in the format of the file's suffix, read it back and compare it with the model in this process.

    Args:
        model: A timm model, fused or not. It is not changed.
        file: The file to write. It ends in `.onnx`, `.pt2` (torch.export program) or `.ts` (TorchScript). An existing
            file is only replaced after all checks have passed.
        size: Height and width in pixels, by default those of the model's training.
        dynamic_batch: Whether the file takes any number of images. By default it takes one.
        dynamic_size: Whether the file takes images of any height and width.
        dtype: Dtype of weights and images.
        metadata: Entries for the file's metadata. In ONNX, preprocessing and labels are entries, too. The other two
            formats store each entry as an extra file.

    Returns:
        All checks. All have passed.

    Raises:
        ValueError: if the suffix is another one, or the model does not take images of this size.
        RuntimeError: if a check failed. No file is left behind.
    """
    if file.suffix not in SUFFIXES:
        raise ValueError(f"expected a file that ends in {', '.join(SUFFIXES)}, got {file}")
    model = copy.deepcopy(model).eval().requires_grad_(False).to(dtype)
    inputs = _inputs(model, size, dynamic_batch, dynamic_size, dtype)
    try:
        expected = [_logits(model, batches) for batches in inputs]
    except Exception as error:  # architectures raise different errors for sizes that they do not take
        shape = tuple(inputs[0][0].shape[1:])
        raise ValueError(f"the model does not take images of {shape}: {reason(error)}") from error
    writer = {".onnx": _write_onnx, ".pt2": _write_program, ".ts": _write_torchscript}[file.suffix]
    with replacing(file) as temporary:
        written = writer(
            model, inputs[0][0], _dims(model, dynamic_batch, dynamic_size), temporary, dict(metadata or {})
        )
        checks = list(written.checks)
        for batches, logits in zip(inputs, expected, strict=True):
            try:
                found = _logits(written.logits, batches)
            except Exception as error:  # every runtime has its own
                raise RuntimeError(
                    f"{SUFFIXES[file.suffix]} was not written, as it does not run: {reason(error)}"
                ) from error
            checks += _compare(found, logits, tuple(batches[0].shape), dtype)
        if failed := [f"{check.name}: {check.measured}" for check in checks if not check.ok]:
            raise RuntimeError(f"{SUFFIXES[file.suffix]} was not written, as it failed: {'; '.join(failed)}")
    return checks


def _inputs(
    model: nn.Module, size: int | None, dynamic_batch: bool, dynamic_size: bool, dtype: torch.dtype
) -> list[tuple[Tensor, ...]]:
    """The inputs to try the file with. Each is a tuple of batches, which together hold all photographs."""
    photos = photographs(model, size).to(dtype)
    inputs: list[tuple[Tensor, ...]] = [photos.split(1)]
    if dynamic_batch:
        inputs = [(photos,), (photos[:1],)]
    if dynamic_size:
        height, width = photos.shape[-2:]
        other = nn.functional.interpolate(inputs[0][0].float(), (height + 37, width + 64))
        inputs.append((other.to(dtype),))
    return inputs


def _dims(model: Any, dynamic_batch: bool, dynamic_size: bool) -> _Dims:
    """The axes of the images that may vary."""
    dims: dict[int, Any] = {}
    if dynamic_batch:
        dims[0] = torch.export.Dim("batch")
    if dynamic_size:  # exporters must know that no map has a single pixel, which would broadcast
        smallest = model.feature_info[-1]["reduction"] + 1
        dims[2] = torch.export.Dim("height", min=smallest)
        dims[3] = torch.export.Dim("width", min=smallest)
    return dims or None


@torch.inference_mode()
def _logits(run: Callable[[Tensor], Tensor], batches: Sequence[Tensor]) -> Tensor:
    return torch.cat([run(images) for images in batches])


def _compare(ours: Tensor, expected: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> list[FileCheck]:
    """Compare logits (photographs, classes) that were computed from batches of this shape."""
    error, bound = relative_error(ours, expected), BOUNDS[dtype]
    what = f"{counted(len(expected), 'crop')} as {' x '.join(map(str, shape))}"
    checks = [FileCheck(f"logits of {what}", f"relative error {error:.1e}, at most {bound:g}", error <= bound)]
    if dtype == torch.float32:  # in half precision, rounding swaps classes with almost equal logits
        k = min(5, expected.shape[-1])
        same = torch.equal(ours.topk(k).indices, expected.topk(k).indices)
        checks.append(FileCheck(f"top {k} of {what}", "equal" if same else "different", same))
    return checks


def _write_program(model: nn.Module, images: Tensor, dims: _Dims, file: Path, metadata: dict[str, str]) -> _ReadBack:
    program = torch.export.export(model, (images,), dynamic_shapes=_shapes(dims), strict=False, **_DEFERRED)
    torch.export.save(program, file, extra_files=dict(metadata))
    return _ReadBack(torch.export.load(file).module(), [])


def _write_torchscript(
    model: nn.Module, images: Tensor, dims: _Dims, file: Path, metadata: dict[str, str]
) -> _ReadBack:
    with warnings.catch_warnings():  # torch deprecates TorchScript in every call
        warnings.filterwarnings("ignore", r"`torch\.jit", FutureWarning)
        torch.jit.save(torch.jit.script(model), file, _extra_files=metadata)
        return _ReadBack(torch.jit.load(file), [])


def _write_onnx(model: nn.Module, images: Tensor, dims: _Dims, file: Path, metadata: dict[str, str]) -> _ReadBack:
    if not onnx_is_installed():
        raise RuntimeError(f"ONNX needs onnx, onnxscript and onnxruntime: {install_hint('export')}")
    import onnx
    import onnxruntime

    program: Any = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        optimize=True,  # torch 2.6 leaves arithmetic on weights otherwise
        dynamic_shapes=_shapes(dims),
        input_names=["images"],
        output_names=["logits"],
        external_data=False,
        verbose=False,
    )
    proto = program.model_proto
    onnx.helper.set_model_props(proto, _metadata(model) | metadata)
    onnx.save(proto, file)
    onnx.checker.check_model(file, full_check=True)
    checks = [FileCheck("onnx.checker", "valid", True), *_graph_checks(onnx.load(file).graph)]
    session: Any = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def run(batch: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])

    return _ReadBack(run, checks)


def _shapes(dims: _Dims) -> tuple[dict[int, Any]] | None:
    """The dimensions in torch.export's form: one entry for each argument."""
    return None if dims is None else (dims,)


def _metadata(model: Any) -> dict[str, str]:
    data: dict[str, Any] = resolve_model_data_config(model, use_test_size=True)
    return {
        "architecture": str(model.pretrained_cfg.get("architecture")),
        "preprocessing": json.dumps(data),
        "labels": json.dumps(labels(model)),
    }


def _graph_checks(graph: Any) -> list[FileCheck]:
    """Check an ONNX graph: neither normalisation nor arithmetic on nothing but weights may be left."""
    forbidden = sorted({node.op_type for node in graph.node} & set(_FORBIDDEN))
    constant = {tensor.name for tensor in graph.initializer}
    arithmetic: set[str] = set()
    for node in graph.node:
        if all(name in constant for name in node.input if name):
            constant.update(node.output)
            if node.op_type not in ("Constant", "Identity"):
                arithmetic.add(node.op_type)
    found = f"{', '.join(sorted(arithmetic))}, which timm_nf.fuse(model) bakes in" if arithmetic else "none left"
    return [
        FileCheck("normalisation", ", ".join(forbidden) or "none left", not forbidden),
        FileCheck("arithmetic on weights", found, not arithmetic),
    ]

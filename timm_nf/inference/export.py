"""Networks for other run times: ONNX, torch.export programs, TorchScript. What is written is reloaded and compared.

Constant weights are baked in first (`timm_nf.fuse`), so that a file holds convolutions and elementwise operations, not
the arithmetic of standardised weights, which exporters keep for every inference otherwise.
"""

import copy
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import is_model
from torch import Tensor, nn

from .classify import labels

__all__ = ["BOUNDS", "SUFFIXES", "Check", "is_known", "onnx_is_installed", "photographs", "write"]

# Relative L2 error of the logits that is still rounding: another order of summation, a few roundings of half precision.
BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
SUFFIXES = {".onnx": "ONNX", ".pt2": "torch.export program", ".ts": "TorchScript"}
# What standardised weights and batch normalisation leave in a graph; other kinds of normalisation are a network's own.
_FORBIDDEN = ("BatchNormalization", "InstanceNormalization")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at in the file, after reading it back."""

    name: str
    measured: str
    ok: bool


def photographs(model: Any, size: int | None = None, count: int = 4) -> Tensor:
    """Crops of a real photograph with the model's preprocessing: (count, in_chans, size, size), float32.

    It is the portrait of Grace Hopper that comes inside matplotlib; other than three channels are its three, repeated.

    Args:
        model: Any timm model.
        size: Height and width in pixels, by default those the model is trained at.
        count: How many crops.
    """
    from matplotlib.cbook import get_sample_data

    data = resolve_model_data_config(model)
    height, width = data["input_size"][1:]
    data["input_size"] = (3, size or height, size or width)
    transform: Any = create_transform(**data, is_training=False)
    with Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)) as picture:
        whole = picture.convert("RGB")
    corners = [50 * i for i in range(count)]
    photos = torch.stack([transform(whole.crop((at, at, whole.width, whole.height))) for at in corners])
    return photos[:, [i % 3 for i in range(getattr(model, "in_chans", 3))]]


def is_known(name: str) -> bool:
    """Whether timm would know what to build: a registered name, with or without a tag, or a place of weights."""
    return ":" in name or is_model(name.partition(".")[0])


def onnx_is_installed() -> bool:
    """Whether everything that writing, checking and running ONNX takes can be imported."""
    return all(find_spec(package) for package in ("onnx", "onnxscript", "onnxruntime"))


def write(
    model: Any,
    file: Path,
    *,
    size: int | None = None,
    dynamic_batch: bool = False,
    dynamic_size: bool = False,
    dtype: torch.dtype = torch.float32,
) -> list[Check]:
    """Write a model in the format of the file's suffix, read it back and compare it with the model in this process.

    Args:
        model: A timm model, fused where that is wanted; not changed.
        file: Ends in `.onnx`, `.pt2` (torch.export program) or `.ts` (TorchScript). An existing one is replaced, but
            only by one that passed all checks.
        size: Height and width in pixels, by default those the model is trained at.
        dynamic_batch: Take any number of images instead of one at a time.
        dynamic_size: Let height and width differ as well.
        dtype: Of weights and images.

    Returns:
        What was checked; all of it passed.

    Raises:
        ValueError: Another suffix, or images of this size do not fit the model.
        RuntimeError: A check failed; nothing is left behind.
    """
    if file.suffix not in SUFFIXES:
        raise ValueError(f"expected a file that ends in {', '.join(SUFFIXES)}, got {file}")
    model = copy.deepcopy(model).eval().requires_grad_(False).to(dtype)
    photos = photographs(model, size).to(dtype)
    batches = [(photos,), (photos[:1],)] if dynamic_batch else [photos.split(1)]
    if dynamic_size:
        height, width = photos.shape[-2:]
        other = nn.functional.interpolate(batches[0][0].float(), (height + 37, width + 64))
        batches.append((other.to(dtype),))
    try:
        expected = [torch.cat([_run(model, images) for images in batch]) for batch in batches]
    except Exception as error:  # every architecture has its own way of not taking a size
        raise ValueError(f"the model does not take images of {tuple(photos.shape[1:])}: {error}") from error
    dims = {0: torch.export.Dim("batch")} if dynamic_batch else {}
    if dynamic_size:  # a map of a single value would broadcast; exporters want to know that there will be none
        smallest = model.feature_info[-1]["reduction"] + 1
        dims |= {axis: torch.export.Dim(name, min=smallest) for axis, name in ((2, "height"), (3, "width"))}
    with _temporary(file) as temporary:
        writer = {".onnx": _write_onnx, ".pt2": _write_program, ".ts": _write_torchscript}[file.suffix]
        run, checks = writer(model, batches[0][0], (dims,) if dims else None, temporary)
        for batch, logits in zip(batches, expected, strict=True):
            checks += _compare(torch.cat([run(images) for images in batch]), logits, tuple(batch[0].shape), dtype)
        if failed := [f"{check.name}: {check.measured}" for check in checks if not check.ok]:
            raise RuntimeError(f"{SUFFIXES[file.suffix]} was not written, as it failed: {'; '.join(failed)}")
    return checks


@torch.inference_mode()
def _run(model: Any, images: Tensor) -> Tensor:
    return model(images)


@contextmanager
def _temporary(file: Path) -> Iterator[Path]:
    """A path beside the file that takes its place if nothing is raised, and goes if something is."""
    handle, name = tempfile.mkstemp(prefix=f".{file.stem}.", suffix=file.suffix, dir=file.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _compare(ours: Tensor, expected: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> list[Check]:
    """Of logits (photographs, classes) that were computed from batches of this shape."""
    error = ((ours.double() - expected.double()).norm() / expected.double().norm()).item()
    what = f"{len(expected)} crops as {' x '.join(map(str, shape))}"
    checks = [
        Check(f"logits of {what}", f"relative error {error:.1e}, at most {BOUNDS[dtype]:g}", error <= BOUNDS[dtype])
    ]
    if dtype == torch.float32:  # in half precision classes a rounding apart change places
        k = min(5, expected.shape[-1])
        same = torch.equal(ours.topk(k).indices, expected.topk(k).indices)
        checks.append(Check(f"top {k} of {what}", "equal" if same else "different", same))
    return checks


Written = tuple[Callable[[Tensor], Tensor], list[Check]]


def _write_program(model: nn.Module, images: Tensor, shapes: Any, file: Path) -> Written:
    program = torch.export.export(
        model, (images,), dynamic_shapes=shapes, prefer_deferred_runtime_asserts_over_guards=True
    )
    torch.export.save(program, file)
    return torch.export.load(file).module(), []


def _write_torchscript(model: nn.Module, images: Tensor, shapes: Any, file: Path) -> Written:
    with warnings.catch_warnings():  # torch would rather export: said by its documentation, and not by every command
        warnings.filterwarnings("ignore", r"`torch\.jit", FutureWarning)
        torch.jit.save(torch.jit.script(model), file)
        loaded: Any = torch.jit.load(file)
    return lambda batch: _run(loaded, batch), []


def _write_onnx(model: nn.Module, images: Tensor, shapes: Any, file: Path) -> Written:
    if not onnx_is_installed():
        raise RuntimeError("ONNX needs onnx, onnxscript and onnxruntime; pip install timm-nf[export]")
    import onnx
    import onnxruntime

    program: Any = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        dynamic_shapes=shapes,
        input_names=["images"],
        output_names=["logits"],
        external_data=False,
        verbose=False,
    )
    proto = program.model_proto
    onnx.helper.set_model_props(proto, _metadata(model))
    onnx.save(proto, file)
    onnx.checker.check_model(file, full_check=True)
    checks = [Check("onnx.checker", "valid", True), *_graph_checks(onnx.load(file).graph)]
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def run(batch: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])

    return run, checks


def _metadata(model: Any) -> dict[str, str]:
    data = resolve_model_data_config(model, use_test_size=True)
    return {
        "architecture": str(model.pretrained_cfg.get("architecture")),
        "preprocessing": json.dumps(data),
        "labels": json.dumps(labels(model)),
    }


def _graph_checks(graph: Any) -> list[Check]:
    """Whether normalisation or arithmetic on nothing but weights is left in an ONNX graph."""
    forbidden = sorted({node.op_type for node in graph.node} & set(_FORBIDDEN))
    constant = {tensor.name for tensor in graph.initializer}
    arithmetic: list[str] = []
    for node in graph.node:
        if all(name in constant for name in node.input if name):
            constant.update(node.output)
            if node.op_type not in ("Constant", "Identity"):
                arithmetic.append(node.op_type)
    return [
        Check("normalisation", ", ".join(forbidden) or "none left", not forbidden),
        Check("arithmetic on weights", ", ".join(arithmetic) or "none left", not arithmetic),
    ]

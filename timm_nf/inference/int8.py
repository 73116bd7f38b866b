"""ONNX files in 8-bit integers, by onnxruntime's own static quantiser, compared with float32 on pictures.

Only convolutions are quantised: weights per channel and signed, activations per tensor and unsigned, in QDQ form.
`python -m benchmarks.int8` measures what else could be, and why it stays float.
"""

# onnx and onnxruntime have no types or partial ones.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateImportUsage=false, reportMissingTypeStubs=false

import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from .._progress import Progress, silent
from .._relative_error import relative_error
from . import export
from .images import reader

__all__ = ["FEWEST", "QUANTIZED", "Comparison", "quantize", "session", "split", "write"]

FEWEST = 10  # pictures: fewer say nothing about the range of activations, and leave too few to compare
_MOST_CALIBRATION = 256
_WORST = 0.5  # relative error of logits; noise as large as half of them is no network to use
# The share of time that is not in convolutions is small; see benchmarks/int8.py for the other types of nodes.
QUANTIZED = ("Conv",)


class Comparison(NamedTuple):
    """The int8 file beside the float32 one, on pictures that it was not calibrated on.

    Attributes:
        calibrated: How many pictures gave the ranges of activations.
        compared: How many others were compared.
        same_class: Share of them that has the same best class.
        error: Relative L2 error of their logits.
        size: Of the file, in bytes.
        float_size: Of the float32 file, in bytes.
        milliseconds: Median of one picture in onnxruntime on this machine, with torch's number of threads.
        float_milliseconds: The same of float32, in turn.
        kept: Types of nodes that stay float.
    """

    calibrated: int
    compared: int
    same_class: float
    error: float
    size: int
    float_size: int
    milliseconds: float
    float_milliseconds: float
    kept: tuple[str, ...]


def split(pictures: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Pictures to calibrate on, at most 256 and at most four fifths, and the rest to compare on; always the same.

    Raises:
        ValueError: if there are fewer than 10.
    """
    shuffled = sorted(set(pictures))
    if len(shuffled) < FEWEST:
        raise ValueError(f"expected at least {FEWEST} pictures to calibrate and compare on, got {len(shuffled)}")
    random.Random(0).shuffle(shuffled)  # folders are sorted by class
    calibration = min(_MOST_CALIBRATION, len(shuffled) * 4 // 5)
    return shuffled[:calibration], shuffled[calibration:]


def write(
    model: nn.Module,
    pictures: Iterable[Path],
    file: Path,
    *,
    size: int | None = None,
    dynamic_batch: bool = False,
    metadata: Mapping[str, str] | None = None,
    kinds: Sequence[str] = QUANTIZED,
    progress: Progress = silent,
) -> Comparison:
    """Write a model as an ONNX file with convolutions in int8, and compare it with float32.

    Args:
        model: A timm model, fused; not changed.
        pictures: Files like those that the network will see.
        file: Ends in `.onnx`. An existing one is replaced, but only by one that is no worse than noise.
        size: Height and width in pixels, by default those the model is trained at.
        dynamic_batch: Take any number of images instead of one at a time.
        metadata: Written into the file beside preprocessing and labels.
        kinds: Types of nodes to quantise, as ONNX names them.
        progress: Shows it.

    Raises:
        ValueError: Fewer than 10 pictures, one that cannot be read, another suffix.
        RuntimeError: The logits are not finite or more than half of their norm off. Nothing is left behind.
    """
    if file.suffix != ".onnx":
        raise ValueError(f"int8 is for files that end in .onnx, got {file}")
    calibration, rest = split(pictures)
    height, width = resolve_model_data_config(model)["input_size"][1:]
    read = reader(model, (size or height, size or width))
    with tempfile.TemporaryDirectory() as folder, export.replacing(file) as temporary:
        wide = Path(folder, "float32.onnx")
        export.write(model, wide, size=size, dynamic_batch=dynamic_batch)
        quantize(wide, temporary, (read(path) for path in progress(calibration, "calibrating")), kinds)
        _describe(temporary, kinds, metadata or {})
        found = _compare(temporary, wide, read, rest, len(calibration), kinds, progress)
        if not (math.isfinite(found.error) and found.error <= _WORST):
            raise RuntimeError(
                f"int8 was not written: its logits are {100 * found.error:.0f} % off those of float32 "
                f"on {found.compared} pictures"
            )
    return found


def quantize(source: Path, target: Path, batches: Iterable[Tensor], kinds: Sequence[str] = QUANTIZED) -> None:
    """Write a float32 ONNX file again with its convolutions in int8.

    Args:
        source: As `export.write` writes it.
        target: Written, not compared.
        batches: Of images, (N, C, H, W) or (C, H, W); they give the ranges of activations.
        kinds: Types of nodes to quantise, as ONNX names them.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = ({"images": _batch(images)} for images in batches)

        def get_next(self) -> Any:
            return next(self.feeds, None)

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder, "prepared.onnx")
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            target,
            Images(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(kinds),
            per_channel=True,
            weight_type=QuantType.QInt8,
            # Processors with VNNI multiply unsigned by signed bytes.
            activation_type=QuantType.QUInt8,
        )


def session(file: Path) -> Callable[[Tensor], Tensor]:
    """The network in an ONNX file as a function of (N, C, H, W) or (C, H, W), on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    opened: Any = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(opened.run(None, {"images": _batch(images)})[0])


def _batch(images: Tensor) -> np.ndarray:
    return (images if images.ndim == 4 else images[None]).numpy()


def _compare(
    narrow: Path,
    wide: Path,
    read: Callable[[Path], Tensor],
    pictures: Sequence[Path],
    calibrated: int,
    quantized: Sequence[str],
    progress: Progress,
) -> Comparison:
    """Run both files on every picture, in turn."""
    import onnx

    files = {"int8": narrow, "float32": wide}
    sessions = {name: session(file) for name, file in files.items()}
    logits: dict[str, list[Tensor]] = {name: [] for name in files}
    times: dict[str, list[float]] = {name: [] for name in files}
    for path in progress(pictures, "comparing"):
        image = read(path)
        for name, run in sessions.items():
            start = time.perf_counter()
            logits[name].append(run(image))
            times[name].append(1e3 * (time.perf_counter() - start))
    ours, expected = (torch.cat(logits[name]) for name in files)
    kinds = {node.op_type for node in onnx.load(narrow).graph.node}
    return Comparison(
        calibrated,
        len(pictures),
        (ours.argmax(1) == expected.argmax(1)).double().mean().item(),
        relative_error(ours, expected),
        narrow.stat().st_size,
        wide.stat().st_size,
        statistics.median(times["int8"]),
        statistics.median(times["float32"]),
        tuple(sorted(kinds - set(quantized) - {"QuantizeLinear", "DequantizeLinear"})),
    )


def _describe(file: Path, kinds: Sequence[str], metadata: Mapping[str, str]) -> None:
    """Check the file and add to its metadata."""
    import onnx

    proto = onnx.load(file)
    known = {entry.key: entry.value for entry in proto.metadata_props}
    kept = "all other nodes are float32"
    onnx.helper.set_model_props(proto, known | {"quantized": f"{', '.join(kinds)} in int8, {kept}"} | dict(metadata))
    onnx.save(proto, file)
    onnx.checker.check_model(file, full_check=True)

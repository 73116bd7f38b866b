"""Writes ONNX files with int8 convolutions, by onnxruntime's static quantiser, and compares them with float32.

Only convolutions are quantised, in QDQ form. Weights are signed, with a scale per channel. Activations are unsigned,
with a scale per tensor. `python -m benchmarks.int8` measures other types of nodes, and shows why they stay float32.

Examples:
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> pictures = [Path(f"{number}.png") for number in range(10)]
    >>> for number, file in enumerate(pictures):
    ...     Image.new("RGB", (32, 32), (20 * number, 100, 100)).save(file)
    >>> len(split(pictures)[0])  # for calibration, the other two for the comparison
    8
    >>> model = timm.create_model("nfnet_f0", depths=(1,), channels=(16,), group_size=8, num_classes=3).eval()
    >>> compared = write(timm_nf.fuse(model), pictures, Path("net.onnx"), size=32)
    >>> isinstance(compared, Comparison), compared.compared
    (True, 2)
    >>> session(Path("net.onnx"))(torch.zeros(3, 32, 32)).shape
    torch.Size([1, 3])

    The same without pictures and without the comparison:

    >>> from timm_nf.inference import export
    >>> checks = export.write(timm_nf.fuse(model), Path("float.onnx"), size=32)
    >>> quantize(Path("float.onnx"), Path("int8.onnx"), torch.rand(2, 1, 3, 32, 32))
"""

# onnx and onnxruntime have no types, or incomplete ones.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateImportUsage=false, reportMissingTypeStubs=false

import math
import random
import statistics
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
from .._temporary import replacing, temporary_folder
from . import export
from .images import reader

__all__ = ["FEWEST", "QUANTIZED", "Comparison", "quantize", "session", "split", "write"]

FEWEST = 10
"""The smallest number of pictures that int8 export accepts: fewer do not show the range of activations."""
_MOST_CALIBRATION = 256
_WORST = 0.5  # relative error of the logits; a network with a larger one is of no use
# Other nodes take little time. benchmarks/int8.py measures them.
QUANTIZED = ("Conv",)
"""The ONNX node types whose weights become int8."""


class Comparison(NamedTuple):
    """The int8 file compared with the float32 file, on pictures that were not used for calibration.

    Attributes:
        calibrated: Number of pictures for calibration.
        compared: Number of pictures for the comparison.
        same_class: Share of the compared pictures with the same best class.
        error: Relative L2 error of the logits.
        size: Size of the int8 file in bytes.
        float_size: Size of the float32 file in bytes.
        milliseconds: Median time of one picture in the int8 file, in onnxruntime, with torch's number of threads.
        float_milliseconds: Median time of one picture in the float32 file. The two files take turns.
        kept: Types of nodes that stay float32.
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
    """Divide pictures into those for calibration and those for the comparison.

    The division is random, but the same in every call. Calibration gets four fifths, and at most 256.

    Raises:
        ValueError: if there are fewer than 10 pictures.
    """
    shuffled = sorted(set(pictures))
    if len(shuffled) < FEWEST:
        raise ValueError(f"expected at least {FEWEST} pictures to calibrate and compare on, got {len(shuffled)}")
    random.Random(0).shuffle(shuffled)  # if there is one folder per class, the sorted paths are in the order of classes
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
    op_types: Sequence[str] = QUANTIZED,
    progress: Progress = silent,
) -> Comparison:
    """Write a model as an ONNX file with int8 convolutions, and compare it with float32.

    Args:
        model: A fused timm model. It is not changed.
        pictures: Picture files like those that the network will see.
        file: The file to write, ending in `.onnx`. An existing file is replaced after the comparison.
        size: Height and width in pixels, by default the model's training size.
        dynamic_batch: Whether the file takes any number of images. By default it takes one.
        metadata: Entries for the file's metadata, in addition to preprocessing and labels.
        op_types: ONNX's types of nodes to quantise.
        progress: Shows progress.

    Raises:
        ValueError: if there are fewer than 10 pictures, a picture cannot be read, or the suffix is another one.
        RuntimeError: if the logits are not finite, or their relative error is above 0.5. No file is written.
    """
    if file.suffix != ".onnx":
        raise ValueError(f"int8 is for files that end in .onnx, got {file}")
    calibration, rest = split(pictures)
    height, width = resolve_model_data_config(model)["input_size"][1:]
    read = reader(model, (size or height, size or width))
    with temporary_folder() as folder, replacing(file) as temporary:
        wide = folder / "float32.onnx"
        export.write(model, wide, size=size, dynamic_batch=dynamic_batch)
        quantize(wide, temporary, (read(path) for path in progress(calibration, "calibrating")), op_types)
        _describe(temporary, op_types, metadata or {})
        found = _compare(temporary, wide, read, rest, len(calibration), op_types, progress)
        if not (math.isfinite(found.error) and found.error <= _WORST):
            raise RuntimeError(
                f"int8 was not written: its logits are {100 * found.error:.0f} % off those of float32 "
                f"on {found.compared} pictures"
            )
    return found


def quantize(source: Path, target: Path, batches: Iterable[Tensor], op_types: Sequence[str] = QUANTIZED) -> None:
    """Write a float32 ONNX file again with int8 convolutions. The result is not compared.

    Args:
        source: A file that `export.write` wrote.
        target: The file to write.
        batches: Images for calibration, (N, C, H, W) or (C, H, W).
        op_types: ONNX's types of nodes to quantise.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = ({"images": _batch(images)} for images in batches)

        def get_next(self) -> Any:
            return next(self.feeds, None)

    with temporary_folder() as folder:
        prepared = folder / "prepared.onnx"
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            target,
            Images(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(op_types),
            per_channel=True,
            weight_type=QuantType.QInt8,
            # VNNI, x86's int8 instructions, multiply unsigned activations by signed weights.
            activation_type=QuantType.QUInt8,
        )


def session(file: Path) -> Callable[[Tensor], Tensor]:
    """The network in an ONNX file, as a function from (N, C, H, W) or (C, H, W) to logits. It runs on the CPU."""
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
    op_types: Sequence[str],
    progress: Progress,
) -> Comparison:
    """Run both files in turn on every picture."""
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
    present = {node.op_type for node in onnx.load(narrow).graph.node}
    return Comparison(
        calibrated,
        len(pictures),
        (ours.argmax(1) == expected.argmax(1)).double().mean().item(),
        relative_error(ours, expected),
        narrow.stat().st_size,
        wide.stat().st_size,
        statistics.median(times["int8"]),
        statistics.median(times["float32"]),
        tuple(sorted(present - set(op_types) - {"QuantizeLinear", "DequantizeLinear"})),
    )


def _describe(file: Path, op_types: Sequence[str], metadata: Mapping[str, str]) -> None:
    """Add entries to the file's metadata, and validate the file."""
    import onnx

    proto = onnx.load(file)
    known = {entry.key: entry.value for entry in proto.metadata_props}
    quantized = f"{', '.join(op_types)} in int8, all other nodes are float32"
    onnx.helper.set_model_props(proto, known | {"quantized": quantized} | dict(metadata))
    onnx.save(proto, file)
    onnx.checker.check_model(file, full_check=True)

"""The commands of `timm-nf` that use a network: classify, export, bench."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
from timm.models import is_model
from torch import nn

from .._text import quoted
from ..inference.bench import Timing
from ..inference.images import Found, find_images
from .options import (
    CheckpointFile,
    Device,
    Dtype,
    FastestDevice,
    License,
    Loaded,
    Network,
    NetworkOption,
    Pictures,
    RegisteredNetwork,
    UseEma,
    any_path,
    existing_folder,
    fastest,
    load_network,
    note_left_out,
    writable,
)
from .terminal import (
    complain,
    console,
    examples,
    file_sizes,
    note,
    print_facts,
    print_line,
    print_table,
    track,
    typer,
    warn,
)

__all__ = ["commands"]

commands = typer.Typer()
"""The typer application of classify, export and bench."""


# -- export ------------------------------------------------------------------------------------------------------------


@commands.command(
    epilog=examples("export nfnet_f0.dm_in1k -o f0.onnx --dynamic-batch", "export my_model/ -o my_model_fused/")
)
def export(
    network: Network,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="PATH",
            help="File: .onnx, .pt2 or .ts (TorchScript); else a folder.",
            parser=any_path,
        ),
    ],
    checkpoint: CheckpointFile = None,
    use_ema: UseEma = False,
    license: License = None,
    size: Annotated[int | None, typer.Option(min=1, help="Height and width, by default as in training.")] = None,
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch", help="Any number of images, not one.")] = False,
    dynamic_size: Annotated[bool, typer.Option("--dynamic-size", help="Any height and width.")] = False,
    dtype: Dtype = None,
    int8: Annotated[
        Path | None,
        typer.Option(
            "--int8",
            metavar="PICTURES",
            help="Store convolutions in int8. The ranges come from a folder of pictures.",
            parser=existing_folder,
        ),
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Take random weights, to time an untrained network.")
    ] = False,
) -> None:
    """Bake standardised weights into plain convolutions and write the network for another run time.

    The file is read back and compared with PyTorch on a photograph before it gets its name. A folder gets Hub layout
    (safetensors, config, card). timm loads it as the same architecture with `fused=True`. Its card needs a --license,
    which is known for published weights. Without --dtype the weights are float32.

    With --int8, onnxruntime measures the ranges of activations on a part of the pictures. The rest compares int8 with
    float32.
    """
    if random_weights:
        _require_registered_alone(network, checkpoint)
    images: Found | None = None
    if int8:
        _require_plain_onnx(out, dynamic_size, dtype)
        images = _enough_pictures(int8)
    to_folder = _is_folder(out)
    if to_folder:
        _require_whole_network(size, dynamic_batch or dynamic_size, random_weights)
        _require_another_folder(network, checkpoint, out)
    _require_fusable(network)
    loaded = _with_random_weights(network) if random_weights else load_network(network, checkpoint, use_ema)
    metadata: dict[str, str] = {}
    if random_weights:
        metadata["weights"] = "random"
    if to_folder:
        if license is None and checkpoint is None and not Path(network).is_dir():
            license = _published_license(loaded.network)
        _export_folder(loaded, out, license, dtype or torch.float32)
    elif images:
        _export_int8(loaded, out, images, size, dynamic_batch, metadata)
    else:
        _export_file(loaded, out, size, dynamic_batch, dynamic_size, dtype or torch.float32, metadata)


def _require_fusable(network: str) -> None:
    """Refuse a network by its name that has nothing to fuse, before its weights are fetched."""
    from ..checkpoint import skeleton
    from ..inference.fuse import fuse

    if Path(network).is_dir() or not is_model(network.partition(".")[0]):
        return
    try:
        fuse(skeleton(network))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _require_registered_alone(network: str, checkpoint: Path | None) -> None:
    if checkpoint or not is_model(network.partition(".")[0]):
        raise typer.BadParameter("--random-weights is for a network by its name alone, without --checkpoint")


def _require_plain_onnx(out: Path, dynamic_size: bool, dtype: torch.dtype | None) -> None:
    if out.suffix != ".onnx" or dynamic_size or dtype:
        raise typer.BadParameter("--int8 is for a file that ends in .onnx, without --dynamic-size and --dtype")


def _enough_pictures(folder: Path) -> Found:
    """The pictures to calibrate and compare on, found before the network is built or fetched."""
    from ..inference.int8 import split

    found = find_images([folder])
    note_left_out(found)
    split(found.pictures)
    return found


def _require_whole_network(size: int | None, dynamic: bool, random_weights: bool) -> None:
    if size or dynamic:
        raise typer.BadParameter("a folder is for any number and size of images: no --size, no --dynamic-*")
    if random_weights:
        raise typer.BadParameter("a folder is for weights: with --random-weights, give a file to --out")


def _require_another_folder(network: str, checkpoint: Path | None, out: Path) -> None:
    from ..hub.folder import WEIGHTS

    source = checkpoint or Path(network.removeprefix("local-dir:")) / WEIGHTS
    written = out / WEIGHTS
    if source.is_file() and written.is_file() and source.samefile(written):
        raise typer.BadParameter(f"{out} holds the network, whose weights would be lost: name another folder for --out")


def _is_folder(out: Path) -> bool:
    """Whether --out is a folder to write and not a file.

    Raises:
        typer.BadParameter: if it can be neither.
    """
    from ..inference.export import SUFFIXES

    is_folder = out.is_dir() or not out.suffix
    if not out.parent.is_dir() or not (is_folder or out.suffix in SUFFIXES):
        known = ", ".join(SUFFIXES)
        raise typer.BadParameter(
            f"expected for --out, in an existing folder, a file that ends in {known} or a folder, got {out}"
        )
    writable(out)
    return is_folder


def _with_random_weights(network: str) -> Loaded:
    from ..inference.named import random_model

    with console(stderr=True).status(f"building {network}"):
        return Loaded(random_model(network), "random, of no use but to time the network")


def _published_license(network: nn.Module) -> str | None:
    cfg: dict[str, str | None] = getattr(network, "pretrained_cfg", {})
    return cfg.get("license")


def _fused(network: nn.Module) -> nn.Module:
    """The network with plain convolutions: itself if it has them already."""
    from ..inference.fuse import fuse

    return network if getattr(network, "fused", False) else fuse(network)


def _export_folder(loaded: Loaded, out: Path, license: str | None, dtype: torch.dtype) -> None:
    from ..hub.folder import write_folder
    from ..inference.fuse import fuse

    with console(stderr=True).status("fusing, writing, reading back"):
        written = write_folder(fuse(loaded.network), out, card={"license": license}, dtype=dtype)
    print_facts(
        [
            ("weights", loaded.weights),
            *written.checks,
            *file_sizes(written.files),
            ("load it with", f"timm.create_model({quoted(f'local-dir:{out}')}, pretrained=True)"),
        ]
    )


def _export_file(
    loaded: Loaded,
    out: Path,
    size: int | None,
    dynamic_batch: bool,
    dynamic_size: bool,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
) -> None:
    from ..inference.bench import bfloat16_is_fast
    from ..inference.export import SUFFIXES, write

    if dtype is torch.bfloat16 and not bfloat16_is_fast():
        warn("this CPU has no bfloat16 instructions, and takes longer in bfloat16 than in float32")
    with console(stderr=True).status("exporting"):
        checks = write(
            _fused(loaded.network),
            out,
            size=size,
            dynamic_batch=dynamic_batch,
            dynamic_size=dynamic_size,
            dtype=dtype,
            metadata=metadata,
        )
    print_table(("check", "measured"), [(check.name, check.measured) for check in checks])
    written = f"{out}, {out.stat().st_size / 1e6:.1f} MB, {SUFFIXES[out.suffix]}"
    print_facts([("weights", loaded.weights), ("wrote", written)])


def _export_int8(
    loaded: Loaded,
    out: Path,
    images: Found,
    size: int | None,
    dynamic_batch: bool,
    metadata: Mapping[str, str],
) -> None:
    from ..env import machine
    from ..inference.int8 import write

    found = write(
        _fused(loaded.network),
        images.pictures,
        out,
        size=size,
        dynamic_batch=dynamic_batch,
        metadata=metadata,
        progress=track,
    )
    ratio = found.float_milliseconds / found.milliseconds
    print_facts(
        [
            ("weights", loaded.weights),
            ("pictures", f"{found.calibrated} to calibrate, {found.compared} others to compare with float32"),
            ("same best class", f"{100 * found.same_class:.1f} % of these"),
            ("logits", f"relative error {found.error:.1e}"),
            ("size", f"{found.size / 1e6:.1f} MB, float32 {found.float_size / 1e6:.1f} MB"),
            ("one picture", f"{found.milliseconds:.1f} ms, float32 {found.float_milliseconds:.1f} ms, {ratio:.1f}x"),
            ("machine", machine()),
            ("still float32", ", ".join(found.kept)),
            ("wrote", str(out)),
        ]
    )


# -- bench -------------------------------------------------------------------------------------------------------------


@commands.command(epilog=examples("bench nfnet_f0", "bench nf_resnet50 --size 224 --batch 8 --json"))
def bench(
    network: RegisteredNetwork,
    checkpoint: CheckpointFile = None,
    use_ema: UseEma = False,
    batch: Annotated[int, typer.Option(min=1, help="Images in a forward pass.")] = 1,
    size: Annotated[int, typer.Option(min=1, help="Height and width of the images.")] = 192,
    repeats: Annotated[
        int, typer.Option(min=3, help="Timed forward passes of each version. Versions take turns.")
    ] = 11,
    device: FastestDevice = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Time inference on this machine: timm's network, ours, fused, in bfloat16, compiled, in onnxruntime, in int8.

    The weights are random: they do not change the times. With a --checkpoint, the trained network is timed, with its
    classes and arguments. The network is one of ours, or one of timm's with standardised convolutions.
    """
    from ..env import machine
    from ..inference.bench import contenders, left_out, time_inference

    device = device or fastest()
    trained: nn.Module | None = None
    weights = "random"
    if checkpoint or use_ema:
        trained, weights = load_network(network, checkpoint, use_ema)
    try:
        work = contenders(network, batch, size, device, trained)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    for label, why in left_out(device).items():
        note(f"left out: {label}: {why}")
    timings = time_inference(work, repeats, device, track)
    if as_json:
        facts = {"model": network, "weights": weights, "batch": batch, "size": size, "device": device}
        facts["machine"] = machine()
        print(json.dumps(facts | {"milliseconds": {label: timing._asdict() for label, timing in timings.items()}}))
        return
    _print_timings(timings)
    shown = f"{network}, batch {batch}, {size} px, {device}"
    print_facts([("network", shown), ("weights", weights), ("machine", machine())])


def _print_timings(timings: Mapping[str, Timing]) -> None:
    first = next(iter(timings))
    columns = ("", "median ms", "quartiles", f"ratio to {first}")
    cells = [
        (
            label,
            f"{timing.median:.1f}",
            f"{timing.low:.1f} to {timing.high:.1f}",
            f"{timings[first].median / timing.median:.2f}x",
        )
        for label, timing in timings.items()
    ]
    print_table(columns, cells, right=columns[1:])


# -- classify ----------------------------------------------------------------------------------------------------------


@commands.command(
    epilog=examples("classify cat.jpg holiday/ --topk 3", "classify 7.png --model local-dir:demo_output/model")
)
def classify(
    images: Pictures,
    model: NetworkOption = "nfnet_f0.dm_in1k",
    checkpoint: CheckpointFile = None,
    use_ema: UseEma = False,
    topk: Annotated[int, typer.Option(min=1, help="Classes to show for each picture.")] = 5,
    device: Device = "cpu",
) -> None:
    """Classify pictures.

    Every format is read that Pillow opens by itself. The orientation in EXIF is applied. Transparent pixels are white.
    Files of other kinds in a folder are counted on stderr. A picture that cannot be read is reported on stderr, the
    others are classified, and the exit code is 1.
    """
    from ..inference.classify import classify

    found = find_images(images)
    loaded = load_network(model, checkpoint, use_ema)
    note_left_out(found)
    if checkpoint:
        note(f"weights: {loaded.weights}")
    failed = 0
    for prediction in classify(loaded.network, found.pictures, topk, device):
        if prediction.error is not None:
            failed += 1
            complain(prediction.error)
            continue
        print_line(str(prediction.path), bold=True)
        for label, probability in prediction.classes:
            print_line(f"  {100 * probability:5.1f} %  {label}")
    if failed:
        raise typer.Exit(1)

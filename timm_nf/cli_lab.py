"""The commands of `timm-nf` that measure."""

from pathlib import Path
from typing import Annotated

from .terminal import console, examples, print_facts, print_table, track, typer

commands = typer.Typer()


@commands.command(
    "clip-range",
    epilog=examples(
        "clip-range --model nfnet_f0 --data pictures/train",
        "clip-range --model dm_nfnet_f0 --pretrained --data pictures/train",
    ),
)
def clip_range(
    model: Annotated[str, typer.Option(help="Any model of timm, by name.")],
    data: Annotated[Path, typer.Option(help="Folder with a folder of pictures for every class.", exists=True)],
    checkpoint: Annotated[Path | None, typer.Option(help="File of weights to start from.", exists=True)] = None,
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

    if pretrained and checkpoint:
        raise typer.BadParameter("--pretrained and --checkpoint exclude each other; give one")
    if not out.parent.is_dir():
        raise typer.BadParameter(f"expected an existing folder for --out, got {out.parent}")
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
    if (still := measured.barely_moving()) > 0.25:
        console(stderr=True).print(
            f"warning: the gradients of {still:.0%} of the units are below a millionth of their weights. In a "
            "normalizer-free network that is the beginning of training, where skip gains are almost 0; choose by the "
            "stages that move, take more --warmup-steps or measure a --checkpoint",
            soft_wrap=True,
        )


def _losses(losses: list[float]) -> str:
    return f"{len(losses)} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}" if losses else "none"

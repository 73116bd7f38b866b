"""The commands of `timm-nf` that move weights."""

import sys
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Annotated, Any

from .._text import quoted
from ..checkpoint import Checkpoint, build, read
from .options import Dtype, License, RegisteredOption, UseEma, any_path, existing_file
from .terminal import console, examples, print_facts, print_table, print_text, typer

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

__all__ = ["commands"]

commands = typer.Typer()
"""The typer application of convert, push and pull."""

# Of train.py's arguments those that make the result, and no paths, names or accounts.
_RECIPE = (
    "opt", "lr", "lr_base", "momentum", "weight_decay", "opt_kwargs", "sched", "epochs", "warmup_epochs", "warmup_lr",
    "cooldown_epochs", "batch_size", "grad_accum_steps", "clip_mode", "clip_grad", "drop", "drop_path", "smoothing",
    "aa", "reprob", "mixup", "cutmix", "img_size", "amp", "amp_dtype", "model_ema_decay", "seed",
)  # fmt: skip


@commands.command(
    epilog=examples(
        "convert F0_haiku.npz -o f0/ --license apache-2.0",
        "convert F0_haiku.npz -o f0/ --license apache-2.0 --push me/f0",
    )
)
def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="One of the authors', a pickle for all its name's .npz.", parser=existing_file
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FOLDER", help="Folder to write, a new or an empty one.", parser=any_path),
    ],
    license: License = None,
    push: Annotated[str | None, typer.Option(metavar="USER/NAME", help="Publish it there too.")] = None,
    dtype: Dtype = None,
) -> None:
    """Write one of the authors' checkpoints as a folder for the Hub and timm, read back and compared.

    Nothing in the checkpoint is run. The network is recognised from its names and shapes. Without a --license, no card
    is written.
    """
    from ..hub.from_haiku import convert

    if push is not None and license is None:
        raise typer.BadParameter("--push needs --license, which is never guessed: it is yours to choose")
    _quiet_progress()
    with console(stderr=True).status("converting, reading back" + (", uploading" if push else "")):
        made = convert(checkpoint, out, license=license, dtype=dtype, repo_id=push)
    arguments = ", ".join([f'"{made.name}"', *(f"{key}={value!r}" for key, value in made.overrides.items())])
    print_table(("check", "result"), made.written.checks)
    print_facts(
        [
            ("network", f"timm.create_model({arguments}), {made.parameters:,} parameters"),
            *(("file", f"{name}, {size:,} bytes") for name, size in made.written.files.items()),
            ("sha256", made.written.sha256),
            *([] if license else [("card", "none: give --license to have one, it is never guessed")]),
            *([("published", str(made.written.url))] if push else []),
            ("load it with", f"timm.create_model({quoted(f'local-dir:{out}')}, pretrained=True), after import timm_nf"),
        ]
    )


@commands.command(
    epilog=examples(
        "push best.pth.tar me/net --model nfnet_f0 --license mit --dry-run",
        "push net.safetensors me/net --model nfnet_f0 --license mit --private",
    )
)
def push(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="Of train.py, Lightning or DeepSpeed, safetensors or their index, a state dict, the authors' .npz.",
            parser=existing_file,
        ),
    ],
    repo_id: Annotated[str, typer.Argument(metavar="USER/NAME", help="Repository, made if it is not there.")],
    model: RegisteredOption,
    license: Annotated[str, typer.Option(help="As the Hub spells it, apache-2.0 say. It is yours to choose.")],
    num_classes: Annotated[int | None, typer.Option(min=0, help="By default train.py's, or else the model's.")] = None,
    use_ema: UseEma = False,
    labels: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Names of the classes, one a line.", parser=existing_file),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="It was trained on, as the Hub names it.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, made if it is not there, or refs/pr/N.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose it as a pull request.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    dtype: Dtype = None,
    architecture: Annotated[
        str | None, typer.Option(help="Load as this model: with dm_nfnet_f0, stock timm loads an nfnet_f0.")
    ] = None,
    overwrite_card: Annotated[bool, typer.Option("--overwrite-card", help="Replace a README that is there.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do everything but upload, and print the card.")] = False,
) -> None:
    """Publish trained weights on the Hugging Face Hub, read back and compared before."""
    from .. import hub

    _quiet_progress()
    content = read(checkpoint, use_ema)
    network = build(model, content, num_classes, _lines(labels) if labels else None)
    fields, accuracy = _fields(content, license, dataset)
    recipe = _recipe(content)
    with console(stderr=True).status("writing, reading back" + ("" if dry_run else ", uploading")):
        written = hub.push(
            network, repo_id, card=fields, revision=revision, private=private, create_pr=create_pr,
            commit_message=message, dtype=dtype, overwrite_card=overwrite_card,
            architecture=architecture, dry_run=dry_run, recipe=recipe,
        )  # fmt: skip
    facts = [("weights", content.origin), ("accuracy", accuracy), *written.checks]
    if recipe:
        facts.append(("recipe", f"{len(recipe)} of train.py's arguments, from the checkpoint"))
    facts += [("file", f"{name}, {size:,} bytes") for name, size in written.files.items()]
    facts.append(("sha256", written.sha256))
    facts.append(("dry run", "nothing was uploaded") if dry_run else ("published", str(written.url)))
    print_facts(facts)
    if dry_run:
        print_text(f"\n{written.card}")


@commands.command(
    epilog=examples("pull user/name", "pull user/name@v1.0 --sha256 SHA256"),
)
def pull(
    repo_id: Annotated[str, typer.Argument(metavar="USER/NAME[@REVISION]", help="Repository; branch, tag or commit.")],
    sha256: Annotated[str | None, typer.Option(help="Which model.safetensors has to have.")] = None,
) -> None:
    """Download a network from the Hugging Face Hub and check every byte and shape of it.

    It is then in the Hub's cache, and timm loads it from there under the name that is printed.
    """
    from huggingface_hub import constants

    from .. import hub

    _quiet_progress()
    hashes = "hashes that name the files in the cache" if constants.is_offline_mode() else "hashes of the Hub"
    network: Any = hub.pull(repo_id, sha256=sha256)
    pinned: str = network.pretrained_cfg["hf_hub_id"]
    print_facts(
        [
            ("repository", pinned),
            ("network", f"{network.pretrained_cfg['architecture']}, {network.num_classes} classes"),
            ("parameters", f"{sum(p.numel() for p in network.parameters()):,} in {_dtype(network)}"),
            ("checked", hashes + (", the sha256 that was given" if sha256 else "") + ", names and shapes"),
            ("load it with", f'timm_nf.hub.pull("{pinned}")'),
            ("or with timm", f'timm.create_model("hf-hub:{pinned}", pretrained=True){_first_import(network)}'),
        ]
    )


def _first_import(network: Any) -> str:
    from ..variants import VARIANTS

    return ", after import timm_nf" if network.pretrained_cfg["architecture"] in VARIANTS else ""


def _lines(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected text in UTF-8 in {file}, got something else ({error.reason})") from None
    return [line.strip() for line in lines if line.strip()]


def _quiet_progress() -> None:
    """No bars into a file or a pipe."""
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()


def _dtype(network: Any) -> str:
    return str(next(network.parameters()).dtype).removeprefix("torch.")


def _recipe(content: Checkpoint) -> dict[str, Any]:
    """The training settings for the card, as far as the checkpoint states them."""
    recipe = {key: content.args[key] for key in _RECIPE if content.args.get(key) not in (None, "", {}, [])}
    if content.epoch is not None:
        recipe["epoch of these weights"] = content.epoch
    return recipe


def _fields(content: Checkpoint, license: str, dataset: str | None) -> tuple[dict[str, Any], str]:
    """Fields of the card's metadata, and where its accuracy comes from."""
    stated = str(content.args.get("dataset") or "")
    if not dataset and stated.startswith("hfds/"):
        dataset = stated.removeprefix("hfds/")
    fields: dict[str, Any] = {"license": license}
    if dataset:
        fields["datasets"] = [dataset]
    metric = content.args.get("eval_metric")
    if content.metric is None or metric not in ("top1", "top5"):
        return fields, "none: the checkpoint has none of these weights"
    args = content.args
    # A file may come from Windows; its paths have either separator.
    name = dataset or stated or PureWindowsPath(str(args.get("data_dir") or args.get("data") or "unknown")).name
    split = str(args["val_split"])
    fields["eval_results"] = [_result(name, split, metric, content.metric)]
    return fields, f"{metric} {content.metric:.3f} on {name}, split {split}, by train.py in epoch {content.epoch}"


def _result(name: str, split: str, metric: str, value: float) -> "EvalResult":
    from huggingface_hub import EvalResult

    result = EvalResult("image-classification", name, name, "accuracy", round(value, 3))
    result.metric_name, result.dataset_split = metric, split
    return result

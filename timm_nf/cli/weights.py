"""The commands of `timm-nf` that move weights: convert, push, pull."""

import sys
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Annotated, Any

from .._dtypes import dtype_name
from .._text import counted, quoted
from ..checkpoint import Checkpoint, build, read
from ..variants import VARIANTS
from .options import Architecture, Dtype, License, RegisteredOption, UseEma, any_path, existing_file
from .terminal import console, examples, file_sizes, print_facts, print_table, print_text, typer

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from ..hub.folder import Written
    from ..hub.from_haiku import Converted

__all__ = ["commands"]

commands = typer.Typer()
"""The typer application of convert, push and pull."""

# The arguments of train.py that change the result. Paths, names and accounts stay out of the card.
_RECIPE = (
    "opt", "lr", "lr_base", "momentum", "weight_decay", "opt_kwargs", "sched", "epochs", "warmup_epochs", "warmup_lr",
    "cooldown_epochs", "batch_size", "grad_accum_steps", "clip_mode", "clip_grad", "drop", "drop_path", "smoothing",
    "aa", "reprob", "mixup", "cutmix", "img_size", "amp", "amp_dtype", "model_ema_decay", "seed",
)  # fmt: skip


def _quiet_progress() -> None:
    """Show no progress bars in a file or a pipe."""
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()


# -- convert -----------------------------------------------------------------------------------------------------------


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
            metavar="FILE",
            help="One of the authors' checkpoints. They end in .npz, and are pickles.",
            parser=existing_file,
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

    Nothing in the checkpoint is run. The network is recognised by its names and shapes. Without a --license, no card is
    written.
    """
    from ..hub.from_haiku import convert

    if push is not None and license is None:
        raise typer.BadParameter("--push needs --license, which is never guessed: it is yours to choose")
    _quiet_progress()
    status = "converting, reading back"
    if push:
        status += ", uploading"
    with console(stderr=True).status(status):
        made = convert(checkpoint, out, license=license, dtype=dtype, repo_id=push)
    print_table(("check", "result"), made.written.checks)
    print_facts(_facts_of_conversion(made, out))


def _facts_of_conversion(made: "Converted", out: Path) -> list[tuple[str, str]]:
    overrides = [f"{key}={value!r}" for key, value in made.overrides.items()]
    arguments = ", ".join([f'"{made.name}"', *overrides])
    facts = [
        ("network", f"timm.create_model({arguments}), {made.parameters:,} parameters"),
        *file_sizes(made.written.files),
        ("sha256", made.written.sha256),
    ]
    if not made.written.card:
        facts.append(("card", "none: give --license to have one, it is never guessed"))
    if made.written.url:
        facts.append(("published", made.written.url))
    loaded = f"timm.create_model({quoted(f'local-dir:{out}')}, pretrained=True), after import timm_nf"
    facts.append(("load it with", loaded))
    return facts


# -- push --------------------------------------------------------------------------------------------------------------


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
    repo_id: Annotated[str, typer.Argument(metavar="USER/NAME", help="The repository. It is made if it is missing.")],
    model: RegisteredOption,
    license: Annotated[
        str,
        typer.Option(help="License of the card, as the Hub spells it, for example apache-2.0. It is never guessed."),
    ],
    num_classes: Annotated[
        int | None, typer.Option(min=0, help="Number of classes. By default train.py's, or else the model's.")
    ] = None,
    use_ema: UseEma = False,
    labels: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Names of the classes, one a line.", parser=existing_file),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="The training set, as the Hub names it.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, made if it is missing, or refs/pr/N.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose it as a pull request.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    dtype: Dtype = None,
    architecture: Architecture = None,
    overwrite_card: Annotated[bool, typer.Option("--overwrite-card", help="Replace an existing README.")] = False,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do everything but upload, and print the card.")] = False,
) -> None:
    """Publish trained weights on the Hugging Face Hub. They are read back and compared first."""
    from .. import hub
    from ..hub.client import require_hub

    _quiet_progress()
    if not dry_run:
        require_hub(repo_id, token=None)  # before the work
    content = read(checkpoint, use_ema)
    names = None if labels is None else _lines(labels)
    network = build(model, content, num_classes, names)
    fields, accuracy = _fields(content, license, dataset)
    recipe = _recipe(content)
    status = "writing, reading back"
    if not dry_run:
        status += ", uploading"
    with console(stderr=True).status(status):
        written = hub.push(
            network, repo_id, card=fields, revision=revision, private=private, create_pr=create_pr,
            commit_message=message, dtype=dtype, overwrite_card=overwrite_card,
            architecture=architecture, dry_run=dry_run, recipe=recipe,
        )  # fmt: skip
    print_facts(_facts_of_push(written, content.origin, accuracy, recipe))
    if dry_run:
        print_text(f"\n{written.card}")


def _facts_of_push(written: "Written", weights: str, accuracy: str, recipe: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [("weights", weights), ("accuracy", accuracy), *written.checks]
    if recipe:
        facts.append(("recipe", f"{len(recipe)} of train.py's arguments, from the checkpoint"))
    facts += file_sizes(written.files)
    facts.append(("sha256", written.sha256))
    if written.url is None:
        facts.append(("dry run", "nothing was uploaded"))
    else:
        facts.append(("published", written.url))
    return facts


def _lines(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected text in UTF-8 in {file}, got something else ({error.reason})") from None
    return [line.strip() for line in lines if line.strip()]


def _recipe(content: Checkpoint) -> dict[str, Any]:
    """The training settings for the card, as far as the checkpoint states them."""
    recipe = {key: content.args[key] for key in _RECIPE if content.args.get(key) not in (None, "", {}, [])}
    if content.epoch is not None:
        recipe["epoch of these weights"] = content.epoch
    return recipe


def _fields(content: Checkpoint, license: str, dataset: str | None) -> tuple[dict[str, Any], str]:
    """The fields of the card's metadata, and where its accuracy comes from."""
    stated = str(content.args.get("dataset") or "")
    if not dataset and stated.startswith("hfds/"):
        dataset = stated.removeprefix("hfds/")
    fields: dict[str, Any] = {"license": license}
    if dataset:
        fields["datasets"] = [dataset]
    metric = content.args.get("eval_metric")
    if content.metric is None or metric not in ("top1", "top5"):
        return fields, "none: the checkpoint has none of these weights"
    name = dataset or stated or _folder_of_data(content)
    split = str(content.args["val_split"])
    fields["eval_results"] = [_result(name, split, metric, content.metric)]
    return fields, f"{metric} {content.metric:.3f} on {name}, split {split}, by train.py in epoch {content.epoch}"


def _folder_of_data(content: Checkpoint) -> str:
    """The name of the folder that train.py was given. The rest of its path stays out of the card."""
    path = content.args.get("data_dir") or content.args.get("data") or "unknown"
    return PureWindowsPath(str(path)).name  # the file may come from Windows; this takes both separators


def _result(name: str, split: str, metric: str, value: float) -> "EvalResult":
    from huggingface_hub import EvalResult

    result = EvalResult("image-classification", name, name, "accuracy", round(value, 3))
    result.metric_name = metric
    result.dataset_split = split
    return result


# -- pull --------------------------------------------------------------------------------------------------------------


@commands.command(
    epilog=examples("pull user/name", "pull user/name@v1.0 --sha256 SHA256"),
)
def pull(
    repo_id: Annotated[str, typer.Argument(metavar="USER/NAME[@REVISION]", help="Repository; branch, tag or commit.")],
    sha256: Annotated[str | None, typer.Option(help="The sha256 that model.safetensors must have.")] = None,
) -> None:
    """Download a network from the Hugging Face Hub. Every byte and every shape is checked.

    The network is then in the Hub's cache. timm loads it from there under the name that is printed.
    """
    from .. import hub

    _quiet_progress()
    network: Any = hub.pull(repo_id, sha256=sha256)
    cfg = network.pretrained_cfg
    pinned: str = cfg["hf_hub_id"]
    with_timm = f'timm.create_model("hf-hub:{pinned}", pretrained=True)'
    if cfg["architecture"] in VARIANTS:
        with_timm += ", after import timm_nf"
    parameters = list(network.parameters())
    print_facts(
        [
            ("repository", pinned),
            ("network", f"{cfg['architecture']}, {counted(network.num_classes, 'class', 'classes')}"),
            ("parameters", f"{sum(p.numel() for p in parameters):,} in {dtype_name(parameters[0].dtype)}"),
            ("checked", _what_was_checked(sha256)),
            ("load it with", f'timm_nf.hub.pull("{pinned}")'),
            ("or with timm", with_timm),
        ]
    )


def _what_was_checked(sha256: str | None) -> str:
    from huggingface_hub import constants

    checked = ["hashes of the Hub"]
    if constants.is_offline_mode():
        checked = ["hashes that name the files in the cache"]
    if sha256:
        checked.append("the sha256 that was given")
    return f"{', '.join(checked)}, names and shapes"

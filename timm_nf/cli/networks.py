"""The commands of `timm-nf` that print what is known of our networks: list, info, recipe."""

from dataclasses import fields
from typing import Annotated

from .options import Variant
from .terminal import examples, print_facts, print_table, typer

__all__ = ["commands"]

commands = typer.Typer()
"""The typer application of list, info and recipe."""


@commands.command("list", epilog=examples("list", "list 'nfnet_f?'"))
def list_command(pattern: Annotated[str, typer.Argument(help="Shell pattern of names.")] = "*") -> None:
    """List the networks: parameters, multiply-adds at the training size, image sizes, weights."""
    from fnmatch import fnmatch

    from .._variant_table import COLUMNS, table_row
    from ..inference.named import near_names
    from ..variants import VARIANTS

    names = [name for name in VARIANTS if fnmatch(name, pattern.lower())]
    if not names:
        near = near_names(pattern, list(VARIANTS))
        raise typer.BadParameter(f"no network is called {pattern!r}{near}; `timm-nf list` shows all {len(VARIANTS)}")
    print_table(COLUMNS, [table_row(name) for name in names], right=COLUMNS[1:4])


@commands.command(epilog=examples("info nfnet_f0", "info dm_nf_regnet_b4"))
def info(name: Variant) -> None:
    """Show everything about one network: its row, sizes, weights, preprocessing, how to create it."""
    from ..inference.classify import preprocessing
    from ..variants import VARIANTS

    variant = VARIANTS[name]
    params, macs = variant.cfg.count(variant.train_size)
    created = f"{name}.dm_in1k" if variant.hf_hub_id else name
    if variant.hf_hub_id:
        weights, pretrained = f"https://huggingface.co/{variant.hf_hub_id}", ", pretrained=True"
    else:
        weights, pretrained = "none published", ""
    print_facts(
        [
            ("name", created),
            ("parameters", f"{params:,}"),
            ("multiply-adds", f"{macs / 1e9:.3f} G at {variant.train_size} px"),
            ("train / test size", f"{variant.train_size} / {variant.test_size} px"),
            ("dropout", _in_recipe(variant.drop_rate)),
            ("stochastic depth", _in_recipe(_stochastic_depth(name))),
            ("RandAugment", _rand_augment(variant.rand_augment)),
            ("weights", weights),
            *((f"config {field.name}", str(getattr(variant.cfg, field.name))) for field in fields(variant.cfg)),
            *((f"data {key}", str(value)) for key, value in preprocessing(created).items()),
            ("create it", f'import timm, timm_nf; timm.create_model("{created}"{pretrained})'),
        ]
    )


def _in_recipe(rate: float) -> str:
    return f"{rate} in the paper's recipe, 0 unless asked for"


def _stochastic_depth(name: str) -> float:
    """The rate in the network's first recipe: the one from scratch, if there is one."""
    from ..recipes import purposes, settings

    return settings(name, purposes(name)[0])["drop_path"]


def _rand_augment(magnitude: int | None) -> str:
    return "not given" if magnitude is None else f"4 layers of magnitude {magnitude}"


@commands.command(
    epilog=examples(
        "recipe nfnet_f0 --world-size 32 > f0.yaml", "recipe nfnet_f0 --kind finetune --batch-size 256 > f0.yaml"
    )
)
def recipe(
    name: Variant,
    purpose: Annotated[str, typer.Option("--kind", help="scratch, finetune or small-batch.")] = "scratch",
    world_size: Annotated[int, typer.Option(min=1, help="Processes that share each batch.")] = 1,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Batch size of all processes; the learning rate follows it, except in NF-RegNets."),
    ] = None,
) -> None:
    """Print a paper's training settings as a file for timm's train.py --config.

    The file's first lines say what train.py cannot express, and how to test the result as the authors do.
    """
    from ..recipes import as_yaml

    try:
        text = as_yaml(name, purpose, world_size, batch_size)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    print(text, end="")

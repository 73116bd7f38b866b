"""Networks by name through `diagnostics.signal_stats`: what goes in, what is wrong with what comes out, its picture.

The picture is the signal propagation plot of arXiv:2101.08692: networks side by side, over depth.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from .classify import find_images, load_model, reader

INPUTS = 16  # 16 x 6 x 6 values of a channel where NFNet-F0 is narrowest: the noise of a mean's square is 2e-3 there
_LOG_FROM = 20.0  # ratio of largest to smallest from which a panel is logarithmic; equal steps are a line on a plain
# Where a signal that began with variance 1 has exploded or died: at a hundred times its magnitude, or a hundredth.
# Above 1e4 its square has no room left in float16, which ends at 65504, and below 1e-4 it soon loses digits, at 6e-5.
# Networks as they are made keep away: the smallest of each of timm's families and of ours have variances of 2e-3 to 18.
EXPLODED, DEAD = 1e4, 1e-4

PANELS = {
    "avg_sq_mean": "average squared channel mean",
    "avg_var": "average channel variance",
    "res_avg_var": "variance of the residual branch",
}


def open_branches(model: nn.Module) -> int:
    """Set to 1 the scales that start at 0 and keep a new network's residual branches from adding anything.

    These are skip gains, and scales of last normalisations and standardised convolutions that are zero throughout.

    Returns:
        How many were set.
    """
    closed = [
        p
        for name, p in model.named_parameters()
        if name.rpartition(".")[2] in ("skipinit_gain", "gain") or (name.endswith(".weight") and p.ndim == 1)
        if not p.any()
    ]
    for p in closed:
        nn.init.ones_(p)
    return len(closed)


def load(name: str) -> tuple[nn.Module, str]:
    """A network by name, and what its weights are in words.

    Args:
        name: A folder in Hub layout, or what `timm.create_model` takes. A bare name is the network at initialisation,
            seed 0, with its residual branches opened; one with a tag has published weights.

    Raises:
        RuntimeError: if it cannot be loaded, with what to do.
    """
    if Path(name).is_dir():
        return load_model(f"local-dir:{name}"), "its weights"
    if {".", ":"} & set(name):
        return load_model(name), "its published weights"
    torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
    model = timm.create_model(name)
    opened = open_branches(model)
    return model, f"at initialisation, {opened} zero scales of residual branches set to 1"


def pick(folder: Path) -> list[Path]:
    """At most `INPUTS` of the pictures below a folder, evenly from all of it, as classes lie one after the other.

    Raises:
        ValueError: if there are none.
    """
    found = find_images([folder])
    return found[:: -(-len(found) // INPUTS)]


def inputs(model: Any, pictures: Sequence[Path] = ()) -> Tensor:
    """A batch for the network: these pictures, or `INPUTS` images of unit-normal noise.

    Args:
        model: A network of timm.
        pictures: Read and scaled as the network takes them in evaluation; none for noise at its training size.

    Raises:
        ValueError: if one of the pictures cannot be read.
    """
    if not pictures:
        channels, *size = resolve_model_data_config(model)["input_size"]
        noise = torch.Generator().manual_seed(0)
        return torch.randn(INPUTS, getattr(model, "in_chans", channels), *size, generator=noise)
    read, batch = reader(model), []
    for path in pictures:
        try:
            batch.append(read(path))
        except Exception as error:  # the decoders raise all kinds for broken files
            raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}); move it elsewhere") from error
    return torch.stack(batch)


def _trouble(key: str, value: float) -> str | None:
    if not math.isfinite(value):
        return "is not finite"
    if value > EXPLODED:
        return "explodes"
    return "dies" if value < DEAD and key != "avg_sq_mean" else None  # a mean may well be 0


def troubles(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """In plain words, where in the rows of `signal_stats` something is not finite, explodes or dies; [] if nowhere."""
    meanings = {
        "is not finite": "nothing computed from it can be used",
        "explodes": "a hundred times the magnitude of the input and more; half precision overflows soon",
        "dies": "less than a hundredth of the magnitude of the input is left of what tells pictures apart",
    }
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for key, words in PANELS.items():
            value = row[key]
            if value is not None and (kind := _trouble(key, value)):
                what = "residual branch" if key == "res_avg_var" else "signal"
                found.setdefault((kind, what), []).append(f"{row['name']} ({words} {value:.2g})")
    return [
        f"the {what} {kind}, first at {found[kind, what][0]}; {meanings[kind]}"
        for kind in meanings
        for what in ("signal", "residual branch")
        if (kind, what) in found
    ]


def draw(measured: Mapping[str, Sequence[Mapping[str, Any]]], title: str, file: Path) -> None:
    """Write the picture: three panels, a line for every network, dashed what a normalizer-free one expects.

    Args:
        measured: Rows of `diagnostics.signal_stats` by what to call the network.
        title: Of the picture.
        file: To write, in the format that its suffix names.
    """
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    lines: list[Line2D] = []
    for axes, (key, words) in zip(figure.subplots(1, 3), PANELS.items(), strict=True):
        shown: list[float] = []
        for index, rows in enumerate(measured.values()):
            curves = {key: {"marker": "o", "markersize": 3, "lw": 1.3}}
            if key == "avg_var":
                curves["expected_var"] = {"ls": "--", "lw": 1}
            for name, style in curves.items():
                values = [math.nan if row[name] is None else row[name] for row in rows]
                axes.plot(values, color=f"C{index}", **style)
                shown += [value for value in values if 0 < value < math.inf]
        if shown and max(shown) > _LOG_FROM * min(shown):
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.set_title(words, fontsize=10)
        axes.set_xlabel("block, 0 is the input of the first")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    lines = [
        Line2D([], [], color=f"C{index}", marker="o", markersize=3, label=name) for index, name in enumerate(measured)
    ]
    if any(row["expected_var"] is not None for rows in measured.values() for row in rows):
        lines.append(Line2D([], [], color="0.4", ls="--", lw=1, label="expected: 1 + k alpha^2 at block k of a stage"))
    figure.legend(handles=lines, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(file, dpi=130)

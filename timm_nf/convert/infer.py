"""Recognises the network of the authors' parameter tree, and loads such a tree into it.

Examples:
    >>> import pickle
    >>> arguments = {"depths": (1, 1, 1, 1), "channels": (16, 16, 32, 32), "group_size": 8, "num_classes": 3}
    >>> model = timm.create_model("nfnet_f0", **arguments)
    >>> tree = timm_nf.convert.timm_to_haiku(model.state_dict())
    >>> infer_variant(tree)[0]
    'nfnet_f0'
    >>> with open("net.npz", "wb") as file:
    ...     pickle.dump(tree, file)
    >>> load_haiku_into(timm.create_model("nfnet_f0", **arguments), "net.npz")
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from ..variants import VARIANTS, NfCfg
from .haiku import FAMILIES, haiku_to_timm, layout
from .haiku_pickle import load_haiku

__all__ = ["infer_variant", "load_haiku_into"]


def infer_variant(params: Mapping[str, Mapping[str, Any]]) -> tuple[str, dict[str, Any]]:
    """Recognise the network of the authors' parameter tree: `timm.create_model(name, **overrides)` has its shapes.

    Args:
        params: `{module: {name: array}}`. Only names and shapes are used.

    Returns:
        The name of the variant that needs the fewest overrides, and these overrides: those of `depths`, `channels`,
        `stem_chs`, `num_features`, `group_size`, `in_chans` and `num_classes` that differ from the variant's. Shapes do
        not show the activation and alpha.

    Raises:
        ValueError: if the names are not those of one network, or if no overrides give these shapes.
    """
    family, depths, _ = layout(params)
    shapes = {(module, name): np.shape(array) for module, entries in params.items() for name, array in entries.items()}

    block, _, _, stem_type = FAMILIES[family]
    blocks = [block + (f"_{number}" if number else "") for number in range(sum(depths))]
    stage_chs = [shapes[f"{family}/~/{blocks[last - 1]}/~/conv2", "w"][3] for last in itertools.accumulate(depths)]
    per_group, mid_chs = zip(*(shapes[f"{family}/~/{name}/~/conv1", "w"][2:] for name in blocks), strict=True)
    stem = last_stem = "initial_conv"
    if family == "NFNet":
        stem, last_stem = "stem_conv0", "stem_conv3"
    in_chans, stem_chs = shapes[f"{family}/~/{stem}", "w"][2], shapes[f"{family}/~/{last_stem}", "w"][3]
    final_chs = shapes.get((f"{family}/~/final_conv", "w"), (0,))[-1]
    num_classes = shapes.get((f"{family}/~/linear", "w"), (0,))[-1]

    def overrides(cfg: NfCfg) -> dict[str, Any]:
        def unscaled(chs: int) -> int:
            """The smallest width that `width_factor` and truncation turn into `chs`."""
            return math.ceil(chs / cfg.width_factor)

        found: dict[str, Any] = {}
        if cfg.depths != tuple(depths):
            found["depths"] = tuple(depths)
        if cfg.stage_chs() != stage_chs:
            found["channels"] = tuple(map(unscaled, stage_chs))
        resized = dataclasses.replace(cfg, **found)  # the widths of stem and final convolution depend on the stages
        if resized.stem_out_chs() != stem_chs:
            found["stem_chs"] = unscaled(stem_chs)
        if resized.final_chs() != final_chs:
            found["num_features"] = unscaled(final_chs)
        # If all bottlenecks have one width, no groups and one group of that width give the same shapes. Variants with
        # groups then get the group, variants without get none.
        plain = per_group == mid_chs and {*mid_chs} == {int(chs * cfg.bottle_ratio) for chs in stage_chs}
        grouped = len({*per_group}) == 1 and (cfg.group_size or not plain)
        group_size = per_group[0] if grouped else 0
        if group_size != (cfg.group_size or 0):
            found["group_size"] = group_size
        if in_chans != 3:
            found["in_chans"] = in_chans
        if num_classes != 1000:
            found["num_classes"] = num_classes
        return found

    cfgs = {name: variant.cfg for name, variant in VARIANTS.items() if variant.cfg.stem_type == stem_type}
    candidates = {name: overrides(cfg) for name, cfg in cfgs.items()}
    name = min(candidates, key=lambda name: len(candidates[name]))
    fields = {k: v for k, v in candidates[name].items() if k not in ("in_chans", "num_classes")}
    expected, _ = dataclasses.replace(cfgs[name], **fields).count(1, in_chans, num_classes)
    if expected != (got := sum(map(math.prod, shapes.values()))):
        raise ValueError(
            f"expected {expected} parameters in a {name} with {candidates[name] or 'nothing changed'}, got {got}: the "
            "bottlenecks, squeeze-excite or the first convolutions have other widths than the authors'"
        )
    return name, candidates[name]


def load_haiku_into(model: nn.Module, path: str) -> None:
    """Load one of the authors' checkpoints into a network. If it does not fit, the network stays as it is.

    Args:
        model: A timm_nf network. The parameters are cast to its dtype.
        path: A file for `load_haiku`.

    Raises:
        ValueError: if the file is not such a checkpoint, or belongs to another network. The message names that network.
    """
    params = load_haiku(path)
    state_dict = haiku_to_timm(params)
    shapes, expected = ({k: tuple(v.shape) for k, v in d.items()} for d in (state_dict, model.state_dict()))
    if shapes != expected:
        wrong = sorted(k for k in shapes.keys() | expected.keys() if shapes.get(k) != expected.get(k))
        name, overrides = infer_variant(params)
        arguments = ", ".join([repr(name), *(f"{k}={v!r}" for k, v in overrides.items())])
        raise ValueError(
            f"{path}: expected the parameters of this network, {len(wrong)} are missing, unknown or of another shape "
            f"({', '.join(wrong[:3])}, ...); the file is for timm.create_model({arguments}), unfused"
        )
    model.load_state_dict(state_dict)

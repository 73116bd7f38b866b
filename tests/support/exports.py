"""Small fused networks for files of other run times, and what `timm-nf export` answers when it refuses."""

from typing import Any

import pytest
import torch
from torch import nn

import timm_nf
from tests.support.small_nets import build
from timm_nf.cli import main

OVERLAY = {"pretrained_cfg_overlay": {"input_size": (3, 64, 64), "label_names": [f"label {i}" for i in range(10)]}}


def fused(family: str = "NFNet", **kwargs: Any) -> nn.Module:
    """A small network with parameters that make every part of it matter, fused."""
    return timm_nf.fuse(build(family, torch.float32, **OVERLAY, **kwargs))


def refused(*argv: object, capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    """The exit code and the one line of `timm-nf export` with these arguments."""
    with pytest.raises(SystemExit) as stop:
        main(["export", *map(str, argv)])
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("timm-nf: error"))
    return stop.value.code, line

"""What train.py takes of a task. timm 1.0.26 has no methods for it, and its train.py takes the task and the model."""

from collections.abc import Iterable
from typing import Any

import timm
from torch import Tensor, nn


def trainable_module(task: Any) -> nn.Module:
    """What is optimized."""
    return task.get_trainable_module() if hasattr(task, "get_trainable_module") else task


def clip_parameters(task: Any, model: nn.Module, exclude_head: bool) -> Iterable[Tensor]:
    """What is clipped."""
    if hasattr(task, "get_clip_parameters"):
        return task.get_clip_parameters(exclude_head=exclude_head)
    return timm.models.model_parameters(model, exclude_head=exclude_head)

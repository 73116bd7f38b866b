"""Finds the model inside the wrappers of training code."""

from collections.abc import Iterator

from torch import nn


def innermost(model: nn.Module) -> nn.Module:
    """The model inside wrappers, in any order: DDP, torch.compile, EMA, timm's tasks and distillation."""
    return list(wrappers(model))[-1]


def wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the model as given, then the model that it wraps, and so on down to the network."""
    yield model
    # A compiled module has all attributes of the module inside, so it must be recognised first.
    compiled = getattr(model, "_orig_mod", None)
    if compiled is not None:
        yield from wrappers(compiled)
    elif not hasattr(model, "get_classifier"):
        # In this order: timm's tasks; its distillation; DDP, DataParallel, FSDP1 and ModelEmaV2/V3.
        for attribute in ("trainable_module", "student", "module"):
            inner = getattr(model, attribute, None)
            if isinstance(inner, nn.Module):
                yield from wrappers(inner)
                return

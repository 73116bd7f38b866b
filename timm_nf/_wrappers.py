"""The model inside the modules that training code wraps around it."""

from collections.abc import Iterator

from torch import nn


def innermost(model: nn.Module) -> nn.Module:
    """The model inside DDP, torch.compile, EMA, timm task and distillation wrappers, in any order."""
    return list(wrappers(model))[-1]


def wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """The model as given, then what it wraps, down to the network itself."""
    yield model
    # A compiled module forwards every attribute to the one inside, so that one goes first.
    compiled = getattr(model, "_orig_mod", None)
    if compiled is not None:
        yield from wrappers(compiled)
    elif not hasattr(model, "get_classifier"):
        # timm's tasks, its distillation student, and what DDP, DataParallel, FSDP1 and ModelEmaV2/V3 call theirs.
        for attribute in ("trainable_module", "student", "module"):
            inner = getattr(model, attribute, None)
            if isinstance(inner, nn.Module):
                yield from wrappers(inner)
                return

"""The names of classes in a network's config, if they belong to this network."""

from collections.abc import Mapping
from typing import Any, cast

__all__ = ["own_labels"]


def own_labels(model: Any, origin: str) -> dict[str, Any]:
    """The `label_names` of a network, and the `label_descriptions` if there are any.

    The config may still have the labels of a classifier that was replaced. Those are left out.

    Args:
        model: The network, as timm's factory makes it.
        origin: Where its config comes from, for messages.

    Raises:
        ValueError: if the labels do not fit, are not texts, or if only some have descriptions.
    """
    cfg: Mapping[str, Any] = model.pretrained_cfg
    num_classes: int = model.num_classes
    built_with: object = getattr(model, "_model_args", {}).get("num_classes")
    names: object = cfg.get("label_names")
    if not names:
        return {}
    if not isinstance(names, list | tuple):
        raise ValueError(f"expected label_names of {origin} as a list, got {type(names).__name__}")
    listed = list(cast(list[object], names))
    if len(listed) != num_classes and len(listed) in (cfg.get("num_classes"), built_with):
        return {}
    if len(listed) != num_classes:
        raise ValueError(f"expected {num_classes} labels in {origin}, one for each class, got {len(listed)}")
    if wrong := [label for label in listed if not isinstance(label, str)]:
        raise ValueError(f"expected texts as labels in {origin}, got {wrong[0]!r} ({type(wrong[0]).__name__})")
    labels: dict[str, Any] = {"label_names": listed}
    if descriptions := cast(object, cfg.get("label_descriptions")):
        labels["label_descriptions"] = _descriptions(descriptions, cast(list[str], listed), origin)
    return labels


def _descriptions(given: object, names: list[str], origin: str) -> dict[str, str]:
    if not isinstance(given, Mapping):
        raise ValueError(f"expected label_descriptions of {origin} by label, got {type(given).__name__}")
    by_name = cast(Mapping[str, object], given)
    without = [name for name in names if not isinstance(by_name.get(name), str)]
    if without:
        raise ValueError(
            f"expected a description of every label in {origin}, got none of {len(without)}, say {without[0][:100]!r}"
        )
    return {name: str(by_name[name]) for name in names}

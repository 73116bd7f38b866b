"""Shows defaults by their value in the reference, also if the source names a constant. mkdocstrings loads this."""

from typing import Any

import griffe


class ConstantDefaults(griffe.Extension):
    """Replaces `clip_factor: float = CLIP_FACTOR` by `clip_factor: float = 0.01`."""

    def on_function(self, *, func: griffe.Function, loader: griffe.GriffeLoader, **_: Any) -> None:
        """Replace a function's defaults, if they are constants of the package, by their values."""
        for parameter in func.parameters:
            default = parameter.default
            if isinstance(default, griffe.ExprName) and default.name.isupper():
                value = loader.modules_collection[default.canonical_path].value
                if str(value)[:1].isdigit():
                    parameter.default = value

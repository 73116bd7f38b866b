"""Write timm_nf/optim/__init__.pyi. It declares the optimizer classes for type checkers: the import makes them.

python -m scripts.optimizer_stub
"""

import re
import sys
from pathlib import Path

from timm.optim import get_optimizer_class, list_optimizers

import timm_nf

FILE = Path(timm_nf.__file__).parent / "optim" / "__init__.pyi"
HEAD = '''"""Written by `python -m scripts.optimizer_stub` from timm's registry: change that, not this."""

from collections.abc import Iterable
from typing import Any

{imports}
from torch import nn

from .agc import ClipStats as ClipStats
from .agc import adaptive_clip_grad_ as adaptive_clip_grad_
from .agc import unitwise_norm as unitwise_norm
from .exempt import classifier_weights as classifier_weights
from .factory import register as register
from .factory import unregister as unregister
from .groups import param_groups_agc as param_groups_agc
from .optimizer import AdaptiveClipping as AdaptiveClipping
from .optimizer import agc_class as agc_class
from .units import Axis
'''
CLASS = """
class {name}(AdaptiveClipping, {base}):
    def __init__(
        self,
        params: Any,
        *args: Any,
        clip_factor: float | None = ...,
        clip_eps: float = ...,
        clip_axis: Axis = ...,
        clip_exempt: str | Iterable[str | nn.Module | nn.Parameter] | None = ...,
        **kwargs: Any,
    ) -> None: ...
"""


def stub() -> str:
    # Only timm's optimizers, by the registry. `agc_class` adds classes of other optimizers to the package.
    classes = {get_optimizer_class(name, bind_defaults=False) for name in list_optimizers("agc*")}
    made = {c.__name__: c for c in sorted(classes, key=lambda c: c.__name__)}
    modules = {n: re.sub(r"^(torch\.optim)\..*", r"\1", c.base_class.__module__) for n, c in made.items()}
    imports = "\n".join(sorted({f"import {module}" for module in modules.values()}))
    bases = {n: f"{modules[n]}.{c.base_class.__qualname__}" for n, c in made.items()}
    return HEAD.format(imports=imports) + "".join(CLASS.format(name=n, base=base) for n, base in bases.items())


def main() -> int:
    FILE.write_text(stub())
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Write timm_nf/optim/__init__.pyi, which tells type checkers the optimizer classes that are made when importing.

python -m scripts.optimizer_stub
"""

import re
import sys
from pathlib import Path

import timm_nf
from timm_nf import optim
from timm_nf.optim.optimizer import AdaptiveClipping

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
    found = {name: made for name, made in vars(optim).items() if isinstance(made, type)}
    made = {n: c for n, c in sorted(found.items()) if issubclass(c, AdaptiveClipping) and c is not AdaptiveClipping}
    # Classes that are made for somebody's own optimizers are not of the registry.
    made = {n: c for n, c in made.items() if c.base_class.__module__.startswith(("timm.optim.", "torch.optim."))}
    modules = {n: re.sub(r"^(torch\.optim)\..*", r"\1", c.base_class.__module__) for n, c in made.items()}
    imports = "\n".join(sorted({f"import {module}" for module in modules.values()}))
    bases = {n: f"{modules[n]}.{c.base_class.__qualname__}" for n, c in made.items()}
    return HEAD.format(imports=imports) + "".join(CLASS.format(name=n, base=base) for n, base in bases.items())


def main() -> int:
    FILE.write_text(stub())
    return 0


if __name__ == "__main__":
    sys.exit(main())

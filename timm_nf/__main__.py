"""Imports timm_nf, then runs a script. For timm's scripts without --device-modules: validate.py, inference.py.

python -m timm_nf SCRIPT [ARGUMENTS...]
torchrun --nproc-per-node 2 -m timm_nf train.py [ARGUMENTS...]
"""

import runpy
import sys
from pathlib import Path

import timm_nf  # noqa: F401  # pyright: ignore[reportUnusedImport]  (registers models, optimizers, clipping)


def main() -> None:
    """Run `sys.argv[1]` like Python does: as `__main__`, with its arguments, and with its folder on the path.

    Raises:
        SystemExit: with code 2 if there is no such script, otherwise with the script's own code.
    """
    script = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    if script is None or not script.is_file():
        got = "no argument" if script is None else f"{script}, which is not a file"
        print(f"usage: python -m timm_nf SCRIPT [ARGUMENTS...]; expected a Python script, got {got}", file=sys.stderr)
        raise SystemExit(2)
    sys.argv = sys.argv[1:]
    sys.path[0] = str(script.resolve().parent)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()

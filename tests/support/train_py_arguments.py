"""The arguments of timm's train.py as facts: by the name it keeps them under, their flags, type and choices.

    python tests/support/train_py_arguments.py TIMM_DIR > tests/golden/train_py_arguments.json

records them from a clone of huggingface/pytorch-image-models; the result says at which commit.
"""

import argparse
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any


def load(timm_dir: str | Path) -> dict[str, Any]:
    """The script's names after running everything but its `main`, on the installed timm."""
    return runpy.run_path(str(Path(timm_dir) / "train.py"), run_name="train")


def arguments(script: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of a script as `load` gives it. `type` is that of a single value, `many` says that there is a list."""
    found = {}
    for action in script["parser"]._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        if isinstance(action, argparse._StoreTrueAction):
            kind = "bool"
        elif type(action).__name__ == "ParseKwargs":
            kind = "dict"
        else:
            assert isinstance(action, argparse._StoreAction), f"{action.dest} is stored in a way unknown here"
            kind = (action.type or str).__name__
        found[action.dest] = {
            "flags": list(action.option_strings),
            "type": kind,
            "many": kind not in ("bool", "dict") and action.nargs not in (None, "?"),
            "default": action.default,
            "choices": list(action.choices) if action.choices else None,
        }
    return found


def record(timm_dir: str) -> str:
    git = ["git", "-C", timm_dir, "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    rows = [f'  "{name}": {json.dumps(facts)}' for name, facts in arguments(load(timm_dir)).items()]
    return f'{{"commit": "{commit}", "arguments": {{\n' + ",\n".join(rows) + "\n}}"


if __name__ == "__main__":
    print(record(sys.argv[1]))

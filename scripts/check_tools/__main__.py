"""Try the networks in other people's tools and write docs/tools.md.

    python -m scripts.check_tools [NAME ...] [--keep]

The tools are installed into environments under .cache/check_tools, about 3 GB. They are removed afterwards, unless
--keep is given. With names, only these probes run, and only their rows of the page change.
"""

import argparse
import shutil
import sys

from rich.console import Console
from rich.progress import track

from .environments import FOLDER, Answer, Outcome, ToolError, ask, install
from .page import PAGE, row, write
from .probes import PROBES


def answer(name: str) -> Answer | str:
    """The answer of a probe, or the reason why there is none."""
    probe = PROBES[name]
    try:
        python = install(name, probe.requirements)
    except ToolError as error:
        return f"does not install: {error}"
    try:
        return ask(name, python)
    except ToolError as error:
        return f"the probe failed: {error}"


def main() -> int:
    """The exit code is 2 for an unknown name, else 0. If a tool fails, that is a result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PROBES))
    parser.add_argument("--keep", action="store_true", help="keep the environments for the next run")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in PROBES]:
        parser.error(f"no probe is called {', '.join(unknown)}; there are {', '.join(PROBES)}")
    console = Console(stderr=True)
    answers: dict[str, Answer | str] = {}
    for name in track(arguments.names or list(PROBES), "trying tools", console=console):
        answers[name] = found = answer(name)
        rows = found.rows if isinstance(found, Answer) else [Outcome("-", "-", found)]
        for one in rows:
            console.print(row(PROBES[name].title, *one), markup=False, highlight=False, soft_wrap=True)
    write(answers)
    console.print(f"wrote {PAGE}")
    if not arguments.keep:
        shutil.rmtree(FOLDER, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

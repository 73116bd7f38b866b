"""Runs the code and the commands of a page, one after the other in an empty folder.

    python -m scripts.site.snippets docs/guides/finetune.md [--write]

Comments above the blocks of a page say what to do with them:

- `<!-- run -->`: run the block.
- `<!-- run slow -->`: run the block, which takes minutes.
- `<!-- run with peft -->`: run the block in an environment of its own with this package.
- `<!-- output -->`: the block holds what the block before it printed. --write replaces it by what is printed now.

All Python blocks of a page run in one namespace, except those with a package, which run in processes of their own. A
block that only has `timm-nf` commands runs in this process, too. Other commands run in bash, with this environment's
`python` and `timm-nf`. The Hub is the tests' stand-in. train.py and validate.py come from the folder in the environment
variable TIMM_DIR.
"""

import argparse
import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scripts.check_tools.environments import install
from tests.support import stand_in_hub

ROOT = Path(__file__).parents[2]
SCRIPTS = ("train.py", "validate.py")
_BLOCK = re.compile(
    r"^<!-- (?P<mark>run|output)(?: (?P<how>slow)| with (?P<packages>[^>]+))? -->\n"
    r"(?P<fence>`{3,})(?P<language>\w*)\n(?P<text>.*?)^(?P=fence)$",
    re.DOTALL | re.MULTILINE,
)


@dataclass
class Snippet:
    """A block to run.

    Attributes:
        language: python or bash.
        text: The code or the commands.
        expected: The output in the page, None if there is none.
        slow: Whether it takes minutes.
        packages: Requirements for pip, beside those of the tests.
        where: The slice of the page that holds the expected output.
    """

    language: str
    text: str
    slow: bool
    packages: tuple[str, ...] = ()
    expected: str | None = None
    where: slice | None = None

    @property
    def needs_timm(self) -> bool:
        """Whether it runs a script from timm's repository."""
        return any(script in self.text for script in SCRIPTS)


def snippets(page: str) -> list[Snippet]:
    """The blocks of a page that have a comment `run`.

    Raises:
        ValueError: if an output comes before the first block, or a block is neither Python nor bash.
    """
    found: list[Snippet] = []
    for match in _BLOCK.finditer(page):
        if match["mark"] == "output":
            if not found:
                raise ValueError("expected a block to run above the first output")
            found[-1].expected, found[-1].where = match["text"], slice(*match.span("text"))
        elif match["language"] not in ("python", "bash"):
            raise ValueError(f"expected python or bash, got a block of {match['language']!r}")
        else:
            packages = tuple((match["packages"] or "").split())
            found.append(Snippet(match["language"], match["text"], bool(match["how"] or packages), packages))
    return found


def run(found: list[Snippet], folder: Path) -> list[str]:
    """Run the blocks in order, and return what each prints. The working directory is an empty folder meanwhile."""
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        runner = _Runner(Path(temporary))
        if any(snippet.needs_timm for snippet in found):
            for script in SCRIPTS:
                shutil.copy(Path(os.environ["TIMM_DIR"]) / script, folder)
        (folder / "examples").symlink_to(ROOT / "examples")
        if any("timm-nf push" in snippet.text for snippet in found):
            runner.hub = stack.enter_context(stand_in_hub.running()).url
        stack.enter_context(contextlib.chdir(folder))
        return [runner.run(snippet) for snippet in found]


class _Runner:
    """Runs the blocks of one page."""

    def __init__(self, programs: Path) -> None:
        self.programs = programs  # a folder for `python`, `timm-nf` and environments
        self.hub = ""
        self.names: dict[str, object] = {"__name__": "__main__"}
        for name, arguments in (("python", ""), ("timm-nf", ' -c "from timm_nf.cli import main; main()"')):
            program = programs / name
            program.write_text(f'#!/bin/sh\nexec "{sys.executable}"{arguments} "$@"\n')
            program.chmod(0o755)

    def run(self, snippet: Snippet) -> str:
        commands = [shlex.split(line, comments=True) for line in snippet.text.replace("\\\n", " ").splitlines()]
        commands = [command for command in commands if command]
        python = install("-".join(snippet.packages), snippet.packages, self.programs) if snippet.packages else None
        if snippet.language == "bash" and self._is_ours(commands):
            from timm_nf.cli import main

            return _printed_by(lambda: [main(command[1:]) for command in commands])
        if snippet.language == "bash":
            return self._process(["bash", "-euo", "pipefail", "-c", snippet.text], python)
        if python:
            return self._process([str(python), "-c", snippet.text], python)
        return _printed_by(lambda: exec(compile(snippet.text, "<snippet>", "exec"), self.names))

    def _is_ours(self, commands: list[list[str]]) -> bool:
        """Whether all commands are of timm-nf, and none of them reads settings of the Hub."""
        return not self.hub and all(command[0] == "timm-nf" and not {">", "|"} & {*command} for command in commands)

    def _process(self, command: list[str], python: Path | None) -> str:
        programs = [str(self.programs), os.environ["PATH"]]
        if python is not None:
            programs.insert(0, str(python.parent))
        environment = os.environ | {
            "HF_HOME": str(self.programs / "hub"), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "COLUMNS": "100",
            "PATH": os.pathsep.join(programs),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }  # fmt: skip
        if self.hub:
            token = next(iter(stand_in_hub.TOKENS))
            environment |= {"HF_ENDPOINT": self.hub, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{command[-1]}\nended with {done.returncode}:\n{done.stdout}\n{done.stderr[-4000:]}")
        return done.stdout.replace(self.hub, "http://127.0.0.1:PORT") if self.hub else done.stdout


def _printed_by(call: Callable[[], object]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        call()
    return printed.getvalue()


def written(page: str, found: list[Snippet], printed: list[str]) -> str:
    """The page with its outputs replaced by what was printed."""
    for snippet, text in reversed(list(zip(found, printed, strict=True))):
        if snippet.where:
            lines = "".join(f"{line.rstrip()}\n" for line in text.rstrip().splitlines())  # tables pad their lines
            page = page[: snippet.where.start] + lines + page[snippet.where.stop :]
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, nargs="+")
    parser.add_argument("--write", action="store_true", help="put the output into the pages")
    arguments = parser.parse_args()
    for path in arguments.pages:
        page = path.read_text()
        found = snippets(page)
        with tempfile.TemporaryDirectory() as folder:
            printed = run(found, Path(folder))
        if arguments.write:
            path.write_text(written(page, found, printed))
        for text in printed:
            print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

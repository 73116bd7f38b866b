"""What the pages tell a reader to run, runs, and prints what they say."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest

from scripts.site.snippets import Snippet, run, snippets, written
from tests.support import GOLDEN, ROOT
from timm_nf.cli import app

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOUND = {page.relative_to(ROOT).as_posix(): snippets(page.read_text()) for page in PAGES}
FAST = {name: quick for name, found in FOUND.items() if (quick := [snippet for snippet in found if not snippet.slow])}
NEED_TIMM = [name for name, found in FOUND.items() if any(snippet.needs_timm for snippet in found)]
SLOW = [name for name, found in FOUND.items() if name not in NEED_TIMM and any(snippet.slow for snippet in found)]


def without_numbers(text: str) -> list[str]:
    """Numbers and hashes differ between machines, columns move with them, and classes change places."""
    text = re.sub(r"\b[0-9a-f]{40,64}\b", "HASH", text)
    return sorted(re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?|[─━]+", "#", text).split())


def holds(found: list[Snippet], folder: Path) -> None:
    for snippet, printed in zip(found, run(found, folder), strict=True):
        if snippet.expected is not None:
            assert without_numbers(printed) == without_numbers(snippet.expected), snippet.text


def test_there_are_pages_with_code_that_is_run():
    assert "README.md" in FAST
    assert len(FAST) >= 4


@pytest.mark.filterwarnings("default")  # a page's reader sees the warnings of other packages, too
@pytest.mark.parametrize("name", FAST)
def test_what_takes_seconds_on_a_page_runs_and_prints_what_it_says(name: str, tmp_path: Path):
    holds(FAST[name], tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", [*SLOW, *(NEED_TIMM if "TIMM_DIR" in os.environ else [])])
def test_a_page_that_takes_minutes_runs_and_prints_what_it_says(name: str, tmp_path: Path):
    holds(FOUND[name], tmp_path)


def commands(program: str) -> list[tuple[str, list[str]]]:
    """Every call of a program in the pages' blocks of commands, with its page."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if program in words:
                    found.append((page.relative_to(ROOT).as_posix(), words[words.index(program) + 1 :]))
    return found


def test_every_option_of_timm_nf_that_a_page_names_is_one():
    import typer

    known = {name: command for name, command in typer.main.get_command(app).commands.items()}
    unknown = []
    for page, (name, *arguments) in ((page, words) for page, words in commands("timm-nf") if words):
        if name == "--help":
            continue
        options = {option for parameter in known[name].params for option in parameter.opts}
        unknown += [(page, name, word) for word in arguments if re.match(r"--?[a-z]", word) and word not in options]
    assert not unknown


def test_every_option_of_train_py_that_a_page_names_is_one():
    arguments = json.loads((GOLDEN / "train_py_arguments.json").read_text())["arguments"]
    options = {flag for argument in arguments.values() for flag in argument["flags"]} | {"--config"}
    words = [(page, word) for page, words in commands("train.py") for word in words if re.match(r"--[a-z]", word)]
    assert len(words) > 10
    assert not [(page, word) for page, word in words if word not in options]


PAGE = """
<!-- run -->
```python
x = 3
print(x, "apples")
```

<!-- output -->
```
2 apples
```

```python
raise SystemExit("this one is not marked")
```

<!-- run slow -->
```bash
echo "$((1 + 1)) pears"
```
"""


def test_marked_blocks_share_their_names_and_outputs_are_compared_without_numbers(tmp_path: Path):
    found = snippets(PAGE)
    assert [(s.language, s.slow, s.expected) for s in found] == [("python", False, "2 apples\n"), ("bash", True, None)]
    printed = run(found, tmp_path)
    assert printed == ["3 apples\n", "2 pears\n"]
    assert without_numbers(printed[0]) == without_numbers("2 apples")
    assert without_numbers(printed[0]) != without_numbers("2 pears")
    assert written(PAGE, found, printed) == PAGE.replace("2 apples", "3 apples")


def test_a_command_that_fails_fails_the_page(tmp_path: Path):
    with pytest.raises(RuntimeError, match="ended with 1"):
        run([Snippet("bash", "false | cat\n", slow=False)], tmp_path)

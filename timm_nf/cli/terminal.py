"""How the `timm-nf` command prints: tables, facts, progress, and errors in one line."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from .._text import install_hint


def not_installed(missing: ModuleNotFoundError) -> str:
    """What to install for a module of the extra `cli`."""
    return f"{missing.name} is not installed: {install_hint('cli')}"


# Every command imports typer from here. If it is missing, this is the only message.
try:
    import typer
    from rich.console import Console
    from rich.progress import track as rich_track
    from rich.table import Table
except ModuleNotFoundError as missing:
    raise SystemExit(f"timm-nf: error: {not_installed(missing)}") from None

__all__ = [
    "complain", "console", "examples", "file_sizes", "not_installed", "note", "print_facts", "print_line",
    "print_table", "print_text", "track", "typer", "visible", "warn",
]  # fmt: skip

_T = TypeVar("_T")


def examples(first: str, second: str) -> str:
    """Two command lines for the end of a command's help."""
    return f"Examples:\n\ntimm-nf {first}\n\ntimm-nf {second}"  # typer joins single line breaks


def visible(text: str) -> str:
    """Escape control characters. Text from a file or a server could otherwise steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def console(stderr: bool = False) -> Console:
    """Where to print. Markup is off: file names may look like it."""
    # A pipe or a file has no width at which lines would have to be cut.
    made = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not made.is_terminal:
        made.width = 240
    return made


def track(items: Iterable[_T], description: str, /) -> Iterable[_T]:
    """The items, with a progress bar on stderr."""
    return rich_track(items, description, console=console(stderr=True))


def print_line(text: str, bold: bool = False) -> None:
    """Print one line, however wide the terminal is."""
    console().print(visible(text), style="bold" if bold else None, soft_wrap=True)


def print_text(text: str) -> None:
    """Print lines as they are."""
    for line in text.split("\n"):
        print_line(line)


def print_table(columns: Sequence[str], cells: Iterable[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Print a table.

    Args:
        columns: Names of the columns.
        cells: The cells of each line.
        right: Names of the columns that are aligned to the right.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for line in cells:
        table.add_row(*map(visible, line))
    console().print(table)


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Print pairs of a name and a value."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(visible(name), visible(value))
    console().print(table)


def file_sizes(sizes: Mapping[str, int]) -> list[tuple[str, str]]:
    """A fact for each file that was written, from its name and its size in bytes."""
    return [("file", f"{name}, {size:,} bytes") for name, size in sizes.items()]


def note(text: str) -> None:
    """Print one line on stderr."""
    console(stderr=True).print(visible(text), soft_wrap=True)


def warn(text: str) -> None:
    """Print a warning as one line on stderr."""
    note(f"warning: {text}")


def complain(message: str) -> None:
    """Print an error as one line on stderr."""
    print(f"timm-nf: error: {visible(' '.join(message.split()))}", file=sys.stderr)

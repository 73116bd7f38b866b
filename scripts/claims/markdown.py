"""Markdown tables of scripts/claims."""

from collections.abc import Iterable


def table(header: Iterable[object], lines: Iterable[Iterable[object]]) -> str:
    """A Markdown table; None is an empty cell."""
    text = [list(header)]
    text += [["---"] * len(text[0]), *map(list, lines)]
    return "\n".join("| " + " | ".join("" if each is None else str(each) for each in line) + " |" for line in text)

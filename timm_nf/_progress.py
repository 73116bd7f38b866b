"""The type of the progress callbacks, which long functions take as an argument, and a silent one."""

from collections.abc import Iterable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Wraps a loop: takes its items and a description, and yields the items one by one."""

    def __call__(self, items: Iterable[T], description: str, /) -> Iterable[T]: ...


def silent(items: Iterable[T], description: str, /) -> Iterable[T]:
    """Show nothing."""
    return items

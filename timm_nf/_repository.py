"""The ways to write a repository of the Hub."""

import re
from typing import NamedTuple
from urllib.parse import unquote

__all__ = ["Repository", "repository"]

_PREFIX = re.compile(r"(hf[-_]hub:|https?://[^/]+/)", re.IGNORECASE)
_TREE = re.compile(r"([^/@]+/[^/@]+)/(?:tree|blob|commit|resolve)/([^/]+).*")  # as a browser shows it


class Repository(NamedTuple):
    """`user/name`, and the branch, tag or commit that was named with it."""

    name: str
    revision: str | None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def repository(text: str) -> Repository:
    """The repository that a text names: `user/name`, `user/name@revision`, `hf-hub:user/name`, or its address.

    The name is not checked. The Hub's client refuses bad ones.
    """
    bare = _PREFIX.sub("", text, count=1) if _PREFIX.match(text) else text
    if bare != text or bare.count("/") > 1:
        bare = bare.partition("?")[0].partition("#")[0]
    if shown := _TREE.fullmatch(bare):
        return Repository(shown[1], unquote(shown[2]))  # a browser shows refs%2Fpr%2F1
    name, _, revision = bare.partition("@")
    return Repository(name.removesuffix("/") if name.count("/") > 1 else name, revision.removesuffix("/") or None)

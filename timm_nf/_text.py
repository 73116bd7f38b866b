"""Parts of what we print: counts, shortened errors of other libraries, how to install an extra, strings in code."""

import json


def reason(error: BaseException, limit: int = 200) -> str:
    """Type and text of an error in one line of at most `limit` characters. Without a text, the type alone.

    The number of an operating system's error is left out.
    """
    told = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = " ".join(told.split())
    name = type(error).__name__
    return f"{name}: {text}"[:limit] if text else name


def counted(number: int, one: str, many: str | None = None) -> str:
    """The number with its noun: "1 step", "2 steps". `many` is the plural if it is not `one` and an s."""
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def quoted(text: str) -> str:
    """The text as a string in Python code: paths of Windows have backslashes, and names may have quotes."""
    return json.dumps(text, ensure_ascii=False)


def install_hint(extra: str) -> str:
    """How to install an extra. The package is not on PyPI yet, so its name alone would install nothing."""
    return f'run pip install ".[{extra}]" in the folder of timm_nf\'s source (it is not on PyPI yet)'

"""Errors of other libraries as part of a one-line message."""


def reason(error: BaseException, limit: int = 200) -> str:
    """The kind and the text of an error in one line, at most `limit` characters; the kind alone where it has no text.

    Other libraries raise texts of many lines and thousands of characters. Of an error of the operating system, the
    number is left out.
    """
    told = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = " ".join(told.split())
    kind = type(error).__name__
    return f"{kind}: {text}"[:limit] if text else kind

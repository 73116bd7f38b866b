"""Shortens the errors of other libraries, whose texts can have many lines, for our one-line messages."""


def reason(error: BaseException, limit: int = 200) -> str:
    """Type and text of an error in one line of at most `limit` characters. Without a text, the type alone."""
    text = " ".join(str(error).split())
    name = type(error).__name__
    return f"{name}: {text}"[:limit] if text else name

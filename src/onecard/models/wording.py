"""How foreign errors are quoted: one line, with their type."""

from __future__ import annotations

_LONGEST = 300


def first_line(error: BaseException) -> str:
    """The first line of an error that says something, with the error's type, shortened to one row."""
    text = next((line.strip() for line in str(error).splitlines() if any(c.isalpha() for c in line)), "")
    text = text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
    return f"{type(error).__name__}: {text}".rstrip(". ") if text else type(error).__name__

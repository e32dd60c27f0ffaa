"""How foreign errors are quoted: one line, with their type, and where the user's own code failed."""

from __future__ import annotations

import re
import sysconfig
import traceback
from pathlib import Path

_LONGEST = 300
_ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_ONECARD = Path(__file__).parents[1]
_PACKAGES = {"site-packages", "dist-packages"}


def first_line(error: BaseException) -> str:
    """The first line of an error that says something, with the error's type, shortened to one row."""
    lines = _ESCAPE.sub("", str(error)).splitlines()  # some libraries set their words in bold
    text = next((line.strip() for line in lines if any(c.isalpha() for c in line)), "")
    text = text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
    return f"{type(error).__name__}: {text}".rstrip(". ") if text else type(error).__name__


def what_it_did(error: BaseException) -> str:
    """What the user's own code did instead of returning: raise an error, or end the program; and in which line."""
    if not isinstance(error, SystemExit):
        return f"raised {first_line(error)}{_place(error)}"
    status = "" if error.code is None else repr(error.code)
    return f"called sys.exit({status[:_LONGEST]}){_place(error)}"


def _place(error: BaseException) -> str:
    """The innermost line of the user's own code, or where all of it is an installed package's, the outermost."""
    library = Path(sysconfig.get_path("stdlib"))
    frames: list[tuple[Path, int | None]] = []
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        if path.is_relative_to(_ONECARD):
            frames.clear()  # what called onecard is not what onecard called
        elif path.is_absolute() and (_PACKAGES & set(path.parts) or not path.is_relative_to(library)):
            frames.append((path, frame.lineno))  # <frozen importlib> is not absolute
    own = [frame for frame in frames if not _PACKAGES & set(frame[0].parts)]
    return "".join(f" (at {path}:{line})" for path, line in own[-1:] or frames[:1])

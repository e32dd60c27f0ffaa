"""The frame of a page of onecard's: one file that needs no network, with its style sheet and what may run in it."""

from __future__ import annotations

import base64
import hashlib
from html import escape
from importlib import resources
from string import Template


def framed(title: str, body: str, style: str = "", script: str = "") -> str:
    """A whole page.

    Args:
        title: plain text.
        body: markup.
        style: rules beside the common ones.
        script: JavaScript; the page lets no other run.
    """
    style = part("page.css") + style
    return Template(part("page.html")).substitute(
        title=escape(title),
        style=style,
        style_hash=_digest(style),
        script=script,
        script_hash=_digest(script),
        body=body,
    )


def part(name: str) -> str:
    """A file of this package, as text."""
    return resources.files("onecard.report").joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """What the content security policy allows: this very style and script, and no other."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

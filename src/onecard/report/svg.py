"""Inline SVG from small parts: scales, ticks, axes, escaped text, and labels that keep apart.

Nothing here sets a colour: every mark has a class, and the page's style sheet knows light and dark.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

CHARACTER = 7.0
"""Width that one character of an 11 px label takes at most, in user units."""
LINE = 13.0
"""Height of one such line."""

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_PLAIN = (1e-3, 1e6)
"""Axes within these bounds are labelled with plain numbers, others with powers of ten throughout."""
_FEW_DECADES = 2.2
_ONE_DECADE = 0.9
_MANY_DECADES = 7


@dataclass(frozen=True)
class Box:
    """A rectangle by its edges."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def inside(self, other: Box) -> bool:
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )


@dataclass(frozen=True)
class Scale:
    """Maps ``low..high`` to the positions ``start..end``, linearly or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(at)
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def ticks(self) -> list[tuple[float, str]]:
        """Values on the scale worth a mark, each with its label."""
        return _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high)


def log_scale(values: Iterable[float], start: float, end: float, margin: float = 0.06) -> Scale:
    """A logarithmic scale around positive values, with a margin of its own length at both ends."""
    good = [v for v in values if v > 0 and math.isfinite(v)] or [1.0]
    low, high = math.log10(min(good)), math.log10(max(good))
    pad = max((high - low) * margin, 0.08)
    return Scale(10 ** (low - pad), 10 ** (high + pad), start, end, log=True)


def zero_scale(values: Iterable[float], start: float, end: float) -> Scale:
    """A linear scale from zero to a little over the largest value."""
    high = max((v for v in values if math.isfinite(v)), default=0.0)
    return Scale(0.0, high * 1.12 if high > 0 else 1.0, start, end)


def _linear_ticks(low: float, high: float) -> list[tuple[float, str]]:
    rough = (high - low) / 5
    power: float = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough)
    decimals = max(0, -math.floor(math.log10(step)) + (step / power == 2.5))  # noqa: PLR2004
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [(n * step, f"{n * step:,.{decimals}f}") for n in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    span = math.log10(high / low)
    if span < _ONE_DECADE:  # too short for 1-2-5: evenly spaced round values say more
        return _linear_ticks(low, high)
    mantissas = (1, 2, 5) if span < _FEW_DECADES else (1,)
    every = 1 if span < _MANY_DECADES else 2
    plain = low >= min(_PLAIN) and high <= max(_PLAIN)
    marks = []
    for exponent in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        for mantissa in mantissas:
            value = mantissa * 10.0**exponent
            if low <= value <= high and exponent % every == 0:
                marks.append((value, _log_label(mantissa, exponent, plain)))
    return marks


def _log_label(mantissa: int, exponent: int, plain: bool) -> str:
    if plain:
        return f"{mantissa * 10.0**exponent:,.{max(0, -exponent)}f}"
    power = f"10{str(exponent).translate(_SUPERSCRIPTS)}"
    return power if mantissa == 1 else f"{mantissa}·{power}"


def number(value: float) -> str:
    """A coordinate, short enough for thousands of them."""
    return f"{value:.1f}".removesuffix(".0")


def element(name: str, content: str = "", /, **attributes: object) -> str:
    """One element; ``class_`` is class, ``_`` in a name is ``-``, floats are rounded.

    ``content`` is markup: text goes through :func:`text` or ``html.escape`` first.
    """
    parts = [name]
    for key, value in attributes.items():
        shown = number(value) if isinstance(value, float) else str(value)
        parts.append(f'{key.rstrip("_").replace("_", "-")}="{html.escape(shown)}"')
    return f"<{' '.join(parts)}>{content}</{name}>" if content else f"<{' '.join(parts)}/>"


def text(x: float, y: float, content: str, class_: str = "", anchor: str = "start") -> str:
    """A piece of text, escaped."""
    return element("text", html.escape(content), x=x, y=y, class_=class_ or "t", text_anchor=anchor)


def title(content: str) -> str:
    """What a pointer sees, and what a screen reader says, of the element around it."""
    return element("title", html.escape(content))


def line(start: tuple[float, float], end: tuple[float, float], class_: str) -> str:
    """A straight line."""
    return element("line", x1=start[0], y1=start[1], x2=end[0], y2=end[1], class_=class_)


def figure(width: float, height: float, parts: Sequence[str], label: str, class_: str = "plot") -> str:
    """The whole drawing, which says ``label`` to who cannot see it; class ``fits`` shrinks it to a narrow page."""
    return element(
        "svg",
        title(label) + "".join(parts),
        viewBox=f"0 0 {number(width)} {number(height)}",
        class_=class_,
        role="img",
        aria_label=label,
    )


def axis_x(scale: Scale, area: Box, label: str) -> list[str]:
    """Grid, tick labels and name of the horizontal axis."""
    parts, last = [], -math.inf
    for value, name in scale.ticks():
        x = scale(value)
        parts.append(line((x, area.top), (x, area.bottom), "grid"))
        if x - len(name) * CHARACTER / 2 > last:
            parts.append(text(x, area.bottom + 16, name, "tick", "middle"))
            last = x + len(name) * CHARACTER / 2 + 4
    parts.append(line((area.left, area.bottom), (area.right, area.bottom), "axis"))
    parts.append(text((area.left + area.right) / 2, area.bottom + 34, label, "name", "middle"))
    return parts


def axis_y(scale: Scale, area: Box, label: str) -> list[str]:
    """Grid, tick labels and, above them, the name of the vertical axis (upright, to be read)."""
    parts = []
    for value, name in scale.ticks():
        y = scale(value)
        parts.append(line((area.left, y), (area.right, y), "grid"))
        parts.append(text(area.left - 7, y + 4, name, "tick", "end"))
    parts.append(text(8, area.top - 12, label, "name"))
    return parts


@dataclass
class Labels:
    """Puts text beside marks so that no label covers another or a mark; leaves out what finds no room."""

    area: Box
    taken: list[Box] = field(default_factory=list)

    def mark(self, x: float, y: float, radius: float) -> None:
        """Keep labels off this place."""
        self.taken.append(Box(x - radius, y - radius, x + radius, y + radius))

    def place(self, at: tuple[float, float], radius: float, content: str, class_: str) -> str:
        """The label as markup, with a thin line to its mark if it stands apart; empty if it is left out."""
        x, y = at
        width = len(content) * CHARACTER
        for dx, dy in _OFFSETS:
            gap = radius + 4
            left = x + gap + dx if dx > 0 else x - gap + dx - width if dx < 0 else x - width / 2
            middle = y + dy + (math.copysign(gap + LINE / 2, dy) if dy else 0.0)
            box = Box(left, middle - LINE / 2, left + width, middle + LINE / 2)
            if box.inside(self.area) and not any(box.overlap(other) for other in self.taken):
                self.taken.append(box)
                leader = self._leader(at, box) if abs(dx) + abs(dy) > _NEAR else ""
                # Anchored on the side of its mark, so that a font of another width grows away from it.
                anchor, start = ("start", left) if dx > 0 else ("end", box.right) if dx < 0 else ("middle", x)
                return leader + text(start, middle + 4, content, class_, anchor)
        return ""

    @staticmethod
    def _leader(at: tuple[float, float], box: Box) -> str:
        x = min(max(at[0], box.left), box.right)
        y = min(max(at[1], box.top), box.bottom)
        return line(at, (x, y), "leader")


_NEAR = 6
# Where a label is tried around its mark, nearest first; 0.5 decides the side only.
_OFFSETS = (
    (0.5, 0),
    (-0.5, 0),
    (0, -0.5),
    (0, 0.5),
    *(
        (dx, dy)
        for d in (8, 18, 30, 44, 60)
        for dx, dy in ((0.5, -d), (0.5, d), (-0.5, -d), (-0.5, d), (0, -d), (0, d))
    ),
)

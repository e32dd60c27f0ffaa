"""A picture of what a card's streams did and when, from a torch profiler's trace: one lane a stream, as SVG."""

from __future__ import annotations

import json
from collections import defaultdict
from html import escape
from pathlib import Path
from typing import NamedTuple

KINDS = {"gpu_memcpy": "#d9822b", "kernel": "#3b7dd8", "gpu_memset": "#8a8f98"}
WIDTH, LEFT, LANE = 1200, 170, 46


class Span(NamedTuple):
    """One piece of work on the card, in microseconds."""

    stream: int
    kind: str
    name: str
    start: float
    end: float


def read_trace(path: Path) -> list[Span]:
    """The card's work in a Chrome trace that ``torch.profiler`` exported."""
    events = json.loads(path.read_text())["traceEvents"]
    return sorted(
        (
            Span(int(e["args"]["stream"]), e["cat"], e["name"], e["ts"], e["ts"] + e["dur"])
            for e in events
            if e.get("cat") in KINDS and "stream" in e.get("args", {})
        ),
        key=lambda span: span.start,
    )


def overlap(spans: list[Span]) -> float:
    """Share of the copying time during which kernels ran."""
    kernels = merged([s for s in spans if s.kind == "kernel"])
    copies = merged([s for s in spans if s.kind == "gpu_memcpy"])
    total = sum(end - start for start, end in copies)
    shared = sum(
        max(0.0, min(a_end, b_end) - max(a_start, b_start)) for a_start, a_end in copies for b_start, b_end in kernels
    )
    return shared / total if total else 0.0


def merged(spans: list[Span]) -> list[tuple[float, float]]:
    """The times covered by any of the spans."""
    result: list[tuple[float, float]] = []
    for span in spans:
        if result and span.start <= result[-1][1]:
            result[-1] = (result[-1][0], max(result[-1][1], span.end))
        else:
            result.append((span.start, span.end))
    return result


def draw(spans: list[Span], title: str, window_us: float) -> str:
    """SVG of the first ``window_us`` of the middle of a trace, so that it shows the steady state."""
    middle = (spans[0].start + spans[-1].end) / 2
    low = max(spans[0].start, middle - window_us / 2)
    shown = [s for s in spans if s.end > low and s.start < low + window_us]
    lanes: dict[int, list[Span]] = defaultdict(list)
    for span in shown:
        lanes[span.stream].append(span)
    busiest = {stream: max({s.kind for s in own}, key=lambda k: total(own, k)) for stream, own in lanes.items()}
    order = sorted(lanes, key=lambda stream: (first_copy_in(lanes[stream]), busiest[stream] != "kernel", stream))
    height = 60 + LANE * len(order) + 40
    scale = (WIDTH - LEFT - 20) / window_us
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="system-ui, sans-serif" '
        f'font-size="13"><rect width="100%" height="100%" fill="#fff"/><text x="16" y="28" font-size="16" '
        f'font-weight="600" fill="#1c2127">{escape(title)}</text>'
    ]
    for row, stream in enumerate(order):
        y = 48 + row * LANE
        parts.append(f'<text x="16" y="{y + 24}" fill="#1c2127">{escape(label(lanes[stream]))}</text>')
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 20}" y1="{y + 36}" y2="{y + 36}" stroke="#e1e4e8"/>')
        for span in lanes[stream]:
            x = LEFT + max(0.0, span.start - low) * scale
            width = max(0.4, (min(span.end, low + window_us) - max(span.start, low)) * scale)
            parts.append(
                f'<rect x="{x:.2f}" y="{y + 6}" width="{width:.2f}" height="26" fill="{KINDS[span.kind]}">'
                f"<title>{escape(span.name)} {span.end - span.start:.0f} us</title></rect>"
            )
    axis = 48 + LANE * len(order) + 14
    for tick in range(5):
        x, anchor = LEFT + (WIDTH - LEFT - 20) * tick / 4, "end" if tick == 4 else "middle"
        text = f"{window_us * tick / 4e3:.1f} ms"
        parts.append(f'<text x="{x:.0f}" y="{axis}" text-anchor="{anchor}" fill="#5c6670">{text}</text>')
    return "".join([*parts, "</svg>\n"])


def total(spans: list[Span], kind: str) -> float:
    return sum(s.end - s.start for s in spans if s.kind == kind)


def first_copy_in(spans: list[Span]) -> int:
    """0 for the stream that copies in, 2 for the one that copies out, 1 for all others."""
    names = {s.name for s in spans if s.kind == "gpu_memcpy" and total(spans, "kernel") < total(spans, "gpu_memcpy")}
    return 0 if any("HtoD" in n for n in names) else 2 if any("DtoH" in n for n in names) else 1


def label(spans: list[Span]) -> str:
    return ("copy in", "compute", "copy out")[first_copy_in(spans)]

"""What each step gained and lost: every recipe beside the one it is a step away from, and the way to the chosen one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from onecard.evidence import Candidate, Evidence
from onecard.recipe import ORIGINAL, Recipe
from onecard.report import figures, svg
from onecard.report import format as fmt
from onecard.report.table import badge, bucket_class, code
from onecard.spec import Bucket

MAX_CHARTS = 3
_SAME = 0.01
"""Share by which two times may always differ and still be called the same; the measured noise may be wider."""
_SHOWN_CHANGE = 5e-5
_SHOWN_SHARE = 5e-3
_DEEPEST = 6
_WIDTH = 560.0
_ROW = 40.0
_LABEL_CHARACTERS = 38


@dataclass(frozen=True)
class Step:
    """One candidate as a step from another: what was changed, and how many steps from the root it stands.

    ``parent`` is None for the root, and for a candidate that nothing measured leads to.
    """

    candidate: Candidate
    parent: Candidate | None
    changed: str
    depth: int


def tree(evidence: Evidence) -> list[Step]:
    """Every candidate, each below the one it is a step away from; fastest first, failures last.

    A parent is a measured candidate with one transform less, or with the same transforms on a simpler engine
    (the same without buckets or mode, the one a CUDA graph captures, eager); where there is none, the nearest
    that has only transforms which the candidate has too. The original is the root.
    """
    parents = {c.id: _parent(evidence, c) for c in evidence.candidates}
    order = {c.id: position for position, c in enumerate(figures.ordered(evidence))}
    found: list[Step] = []

    def walk(parent: Candidate | None, depth: int) -> None:
        wanted = parent.id if parent else None
        children = [c for c in evidence.candidates if (p.id if (p := parents[c.id]) else None) == wanted]
        for child in sorted(children, key=lambda c: (not c.verdict.ok, _first_ms(evidence, c), order[c.id])):
            found.append(Step(child, parent, _changed(parent, child), depth))
            walk(child, depth + 1)

    walk(None, 0)
    return found


def path(evidence: Evidence) -> list[Step]:
    """The steps from the root to the chosen variant, in order; empty if none was chosen."""
    steps = {step.candidate.id: step for step in tree(evidence)}
    found: list[Step] = []
    step = steps.get(evidence.chosen)
    while step is not None:
        found.append(step)
        step = steps.get(step.parent.id) if step.parent else None
    return found[::-1]


def _median_ms(candidate: Candidate, bucket: Bucket) -> float:
    """Its own measurement's median: in the play-off not everyone was."""
    timing = candidate.measurement.timing(bucket)
    return timing.median_ms if timing and timing.samples_ms and timing.median_ms > 0 else math.nan


def _first_ms(evidence: Evidence, candidate: Candidate) -> float:
    ms = _median_ms(candidate, figures.headline_bucket(evidence))
    return math.inf if math.isnan(ms) else ms


def _parent(evidence: Evidence, child: Candidate) -> Candidate | None:
    if child.recipe == ORIGINAL:
        return None
    measured = [
        c
        for c in evidence.candidates
        if (c.recipe == ORIGINAL or any(not math.isnan(_median_ms(c, b)) for b in figures.buckets(evidence)))
        and _leads_to(c.recipe, child.recipe)
    ]
    return min(measured, key=lambda c: (*_distance(c.recipe, child.recipe), not c.verdict.ok), default=None)


def _leads_to(base: Recipe, recipe: Recipe) -> bool:
    """Whether steps that only add lead from one recipe to another; never both ways, so there is no ring."""
    if base == recipe or not _is_part(base.transforms, recipe.transforms):
        return False
    same = (base.backend, base.mode) == (recipe.backend, recipe.mode) and base.static <= recipe.static
    plainer = base.backend == recipe.backend and not base.mode and base.static <= recipe.static
    captured = base.backend == recipe.mode != recipe.backend and not base.mode
    return same or plainer or captured or base.backend == ORIGINAL.backend != recipe.backend


def _is_part(few: Sequence[str], many: Sequence[str]) -> bool:
    """Whether ``few`` are all in ``many``, in the same order."""
    rest = iter(many)
    return all(name in rest for name in few)


def _distance(base: Recipe, recipe: Recipe) -> tuple[int, bool, int, int]:
    """How far apart two recipes are: steps, another engine, how unlike it is, how early the first new transform is."""
    moved = _engine(base) != _engine(recipe)
    steps = len(recipe.transforms) - len(base.transforms) + moved
    unlike = (base.backend not in (recipe.backend, recipe.mode)) + (base.static != recipe.static)
    pairs = zip(base.transforms, recipe.transforms, strict=False)
    alike = next((i for i, (old, new) in enumerate(pairs) if old != new), len(base.transforms))
    return steps, moved, unlike, -alike


def _engine(recipe: Recipe) -> str:
    """The part of a recipe's id that is not its transforms."""
    head = f"{recipe.backend}.{recipe.mode}" if recipe.mode else recipe.backend
    return head + ("@bucket" if recipe.static else "")


def _changed(parent: Candidate | None, child: Candidate) -> str:
    if parent is None:
        return child.id
    old, new = list(parent.recipe.transforms), []
    for name in child.recipe.transforms:
        if old and old[0] == name:
            old.pop(0)
        else:
            new.append(f"+ {name}")
    engine = _engine(child.recipe)
    return " ".join([*([f"→ {engine}"] if engine != _engine(parent.recipe) else []), *new])


def steps_table(evidence: Evidence) -> str:
    """Every step with its times and their ratio to the parent's, memory, size and what the answers lost."""
    steps = tree(evidence)
    if len(steps) < 2:  # noqa: PLR2004 - a root alone is no step
        return ""
    way = {step.candidate.id for step in path(evidence)}
    rows = "".join(_row(evidence, step, step.candidate.id in way) for step in steps)
    heads = ['<th scope="col">step</th>']
    buckets = figures.buckets(evidence)
    for position, bucket in enumerate(buckets):
        name = escape(fmt.sizes(bucket)) + "<br>" if bucket else ""
        heads.append(f'<th scope="col" class="n{bucket_class(position)}">{name}ms</th>')
        heads.append(f'<th scope="col" class="{bucket_class(position).strip()}">{name}against its parent</th>')
    heads += [f'<th scope="col" class="n">{h}</th>' for h in ("peak<br>MiB", "size<br>MiB", _accuracy_name(evidence))]
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Steps"><table class="steps">'
        f"<thead><tr>{''.join(heads)}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _row(evidence: Evidence, step: Step, on_the_way: bool) -> str:
    candidate, verdict = step.candidate, step.candidate.verdict
    mark = ' <span class="pick">chosen</span>' if candidate.id == evidence.chosen else ""
    state = "" if verdict.ok else f" {badge(candidate)}"
    detail = "" if verdict.ok or not verdict.detail else f'<p class="note">{escape(fmt.clean(verdict.detail))}</p>'
    on = "" if step.parent is None else f'<span class="on">on {code(step.parent.id)}</span>'
    depth = f"d{min(step.depth, _DEEPEST)}"
    head = f'<th scope="row" class="{depth}"><b>{code(step.changed)}</b>{mark}{state} {on}{detail}</th>'
    cells = []
    for position, bucket in enumerate(figures.buckets(evidence)):
        ms = _median_ms(candidate, bucket)
        before = _median_ms(step.parent, bucket) if step.parent else math.nan
        cells.append(f'<td class="n{bucket_class(position)}">{fmt.significant(ms)}</td>')
        cells.append(f'<td class="{bucket_class(position).strip()}">{_gain(evidence, bucket, before / ms)}</td>')
    old = step.parent.measurement if step.parent else None
    new = candidate.measurement
    cells.append(f'<td class="n">{_bytes(new.peak_bytes, old.peak_bytes if old else 0)}</td>')
    cells.append(f'<td class="n">{_bytes(new.size_bytes, old.size_bytes if old else 0)}</td>')
    cells.append(f'<td class="n">{_accuracy(candidate, step.parent)}</td>')
    state = "chosen" if on_the_way else "good" if verdict.ok else "bad"
    return f'<tr class="{state}">{head}{"".join(cells)}</tr>'


def _gain(evidence: Evidence, bucket: Bucket, ratio: float) -> str:
    """A ratio with the word for it, so that it does not hang on colour."""
    if math.isnan(ratio):
        return fmt.NONE
    kind, word = gain_word(evidence, bucket, ratio)
    return f'<span class="{kind}">{fmt.times(ratio)} {word}</span>'


def gain_word(evidence: Evidence, bucket: Bucket, ratio: float) -> tuple[str, str]:
    """Class and word for a ratio of times: a gain, a loss, or no more than the noise."""
    rank = figures.rank_of(evidence, bucket)
    if abs(ratio - 1) <= max(_SAME, rank.noise if rank else 0.0):
        return "same", "(same)"
    return ("gain", "faster") if ratio > 1 else ("loss", "slower")


def _bytes(now: int, before: int) -> str:
    if now <= 0:
        return fmt.NONE
    moved = before > 0 and abs(now / before - 1) >= _SHOWN_SHARE
    change = f" <small>{_signed_percent(now / before - 1)}</small>" if moved else ""
    return f"{fmt.mib(now)}{change}"


def _signed_percent(share: float) -> str:
    return f"{_sign(share)}{fmt.percent(abs(share))}"


def _sign(value: float) -> str:
    return "+" if value >= 0 else "\u2212"


def _accuracy_name(evidence: Evidence) -> str:
    named = next((c.metric.name for c in evidence.candidates if c.metric), None)
    return escape(fmt.clean(named)) if named else "rel. error"


def _accuracy(candidate: Candidate, parent: Candidate | None) -> str:
    """The metric and its change, or else the error and what it was before."""
    if candidate.metric:
        shown = fmt.fixed(candidate.metric.value, 4)
        if parent is None or parent.metric is None:
            return shown
        change = candidate.metric.value - parent.metric.value
        return f"{shown} <small>{_sign(change)}{abs(change):.4f}</small>" if abs(change) >= _SHOWN_CHANGE else shown
    error = candidate.worst_error
    if math.isnan(error):
        return "NaN" if candidate.errors else fmt.NONE
    was = parent.worst_error if parent else math.nan
    before = f" <small>was {fmt.relative_error(was)}</small>" if math.isfinite(was) else ""
    return f"{fmt.relative_error(error)}{before}"


def waterfall(evidence: Evidence, bucket: Bucket) -> str:
    """The way from the original to the chosen variant as bars, one a step; empty where there is no way to show."""
    steps = path(evidence)
    times = [_median_ms(step.candidate, bucket) for step in steps]
    if len(steps) < 2 or any(map(math.isnan, times)):  # noqa: PLR2004
        return ""
    area = svg.Box(14, 8, _WIDTH - 14, 12 + _ROW * (len(steps) + 1))
    scale = svg.zero_scale(times, area.left, area.right)
    parts = svg.axis_x(scale, area, "median latency of one call, ms")
    parts += _bar("the original", (0.0, times[0]), fmt.duration_ms(times[0]), area.top, scale, "total")
    for row, (step, before, after) in enumerate(zip(steps[1:], times, times[1:], strict=False), 1):
        top = area.top + _ROW * row
        parts.append(svg.line((scale(before), top - 8), (scale(before), top + 18), "leader"))
        kind, word = gain_word(evidence, bucket, before / after)
        change = f"{_sign(after - before)}{fmt.duration_ms(abs(after - before))}"
        value = f"{change}, {fmt.times(before / after)} {word}"
        parts += _bar(step.changed, (min(before, after), max(before, after)), value, top, scale, kind)
    top = area.top + _ROW * len(steps)
    parts.append(svg.line((scale(times[-1]), top - 8), (scale(times[-1]), top + 18), "leader"))
    total = f"{fmt.duration_ms(times[-1])}, {fmt.times(times[0] / times[-1])} in all"
    parts += _bar(steps[-1].candidate.id, (0.0, times[-1]), total, top, scale, "total chosen")
    label = f"From the original to {fmt.clean(evidence.chosen)} at {fmt.sizes(bucket)}"
    return svg.figure(_WIDTH, area.bottom + 42, parts, label, "plot fits")


def _bar(name: str, ends: tuple[float, float], value: str, top: float, scale: svg.Scale, kind: str) -> list[str]:
    low, high = scale(ends[0]), scale(ends[1])
    note = svg.title(f"{fmt.clean(name)}: {value}")
    return [
        svg.text(scale.start, top + 12, fmt.shorten(fmt.clean(name), _LABEL_CHARACTERS), "l row"),
        svg.text(scale.end, top + 12, value, f"value {kind}", "end"),
        svg.element("rect", note, x=low, y=top + 18, width=max(high - low, 1.5), height=13.0, class_=f"step {kind}"),
    ]

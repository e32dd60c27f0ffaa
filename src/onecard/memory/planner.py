"""Making a plan: every size predicted and measured, then the largest batch, then the advice."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from onecard.errors import Unsupported
from onecard.memory.advice import advise
from onecard.memory.figures import BucketPlan, LargestBatch, MemoryPlan, Prediction
from onecard.memory.largest import largest_under, need_at
from onecard.memory.liveness import CapturedModel, predict_as_written
from onecard.memory.measure import Job, Outcome
from onecard.memory.parts import Place, parts_of, peak_text, slot_bytes, staging
from onecard.recipe import Recipe
from onecard.spec import Bucket, bucket_label

if TYPE_CHECKING:
    from onecard.memory.plan import PlanOptions
    from onecard.memory.subject import Subject
    from onecard.memory.workplace import Workplace

_TRIES = 5  # batches measured on the way to the largest
_CHEAP_TRIES = 40  # where they are only predicted
_CLOSE = 0.97  # a batch that takes this share of the limit is near enough to the largest
_GRAPHS = "cudagraph"


class Planner:
    """One plan: predictions are made once, measurements as they are needed.

    Args:
        subject: what is planned for.
        options: what was asked.
        place: the device, and the slots.
        limit_bytes: what may be used.
        observe: told what is going on.
        work: what measuring needs; None to predict only.
    """

    def __init__(
        self,
        subject: Subject,
        options: PlanOptions,
        place: Place,
        limit_bytes: int,
        observe: Callable[[str], None],
        work: Workplace | None = None,
    ) -> None:
        self.subject = subject
        self.options = options
        self.place = place
        self.limit_bytes = limit_bytes
        self._observe = observe
        self._work = work
        self._captured: CapturedModel | None = None
        self._predictions: dict[tuple[str, str, str], Prediction | str] = {}

    def plan(self, total_bytes: int) -> MemoryPlan:
        """All of it."""
        rows = [self.row(bucket) for bucket in self.subject.buckets]
        largest = self._largest(rows)
        rows.sort(key=lambda row: math.prod(row.bucket.values()))
        short = [row for row in rows if row.fits is False and row.bucket in self.subject.buckets]
        target = max(short, key=lambda row: row.predicted_bytes or 0, default=None)
        notes = list(self.subject.notes)
        if target is not None and target.part("weights"):
            held = target.part("weights") / 2**20
            notes.append(
                f"a copy of the original left open on {self.place.device} holds another {held:,.1f} MiB: close it"
            )
        return MemoryPlan(
            model=self.subject.name,
            source="model" if self.subject.manifest is None else "bundle",
            device=self.place.device,
            precision=self.options.precision if self.subject.manifest is None else "as built",
            spec=self.subject.spec,
            limit_bytes=self.limit_bytes,
            total_bytes=total_bytes,
            depth=self.place.depth,
            buckets=tuple(rows),
            largest=largest,
            advice=advise(self, target, largest, rows) if target is not None else (),
            advice_for=target.bucket if target is not None else {},
            notes=tuple(notes),
        )

    def row(self, bucket: Bucket) -> BucketPlan:
        """One size, predicted and measured."""
        recipe = self.subject.recipe(bucket)
        size = self.subject.run_size(bucket)
        found = self.predict(size)
        variant = recipe.id if recipe is not None else "as given"
        if isinstance(found, str):
            slots = staging(slot_bytes(self.subject.spec, size), self.place)
            row = BucketPlan(bucket, variant, slots, note=found)
        else:
            parts = parts_of(found, self.place, self._graph_bytes(size))
            row = BucketPlan(bucket, variant, parts, peak_text(found))
        if self._work is not None:
            outcome = self._measure(self._work, bucket, row.staging_bytes, recipe)
            row = msgspec.structs.replace(row, measured=outcome.measured, verdict=outcome.verdict)
        return msgspec.structs.replace(row, fits=self._fits(row))

    def need_of_variant(self, row: BucketPlan, recipe: Recipe) -> int | None:
        """What another variant of the bundle takes at a size, measured; None if it is not, or fails."""
        if self._work is None:
            return None
        found = self._measure(self._work, row.bucket, row.staging_bytes, recipe)
        return found.measured.peak_bytes + row.staging_bytes if found.measured is not None else None

    def predict(self, bucket: Bucket, precision: str = "", road: str = "") -> Prediction | str:
        """The prediction at a size, or why there is none.

        Args:
            bucket: the size that is run.
            precision: by default that in which the size is served.
            road: ``as written`` or ``captured``; by default the one that is like the variant's, or else the other.
        """
        precision = precision or self.subject.precision(bucket, self.options.precision)
        recipe = self.subject.recipe(bucket)
        first = "as written" if recipe is None or recipe.backend in ("eager", "torchscript") else "captured"
        second = "captured" if first == "as written" else "as written"
        reasons = []
        for candidate in (road,) if road else (first, second):
            found = self._predict(bucket, precision, candidate)
            if not isinstance(found, str):
                return found
            reasons.append(found)
        return reasons[0]

    def _predict(self, bucket: Bucket, precision: str, road: str) -> Prediction | str:
        if self.subject.flat is None:
            return "the original is not here"
        key = (bucket_label(bucket), precision, road)
        if key not in self._predictions:
            self._observe(f"predicting {bucket_label(bucket)}")
            found: Prediction | str
            try:
                if road == "as written":
                    found = predict_as_written(self.subject.flat, self.subject.spec, bucket, precision)
                else:
                    self._captured = self._captured or CapturedModel(self.subject.flat, self.subject.spec)
                    found = self._captured.predict(bucket, precision)
            except Unsupported as error:
                found = error.detail
            self._predictions[key] = found
        return self._predictions[key]

    def _graph_bytes(self, bucket: Bucket) -> int:
        """Static buffers of the CUDA graphs of the variant that serves this size: one set for each of its sizes."""
        recipe = self.subject.recipe(bucket)
        if recipe is None or recipe.backend != _GRAPHS or self.subject.manifest is None:
            return 0
        found = [self.predict(made) for made in self.subject.manifest.buckets]
        return sum(p.inputs_bytes + p.answer_bytes for p in found if not isinstance(p, str))

    def _fits(self, row: BucketPlan) -> bool | None:
        if row.verdict.reason == "out_of_memory":
            return False
        need = None if row.failed else row.need_bytes
        return None if need is None else need <= self.limit_bytes

    def _measure(self, work: Workplace, bucket: Bucket, staging_bytes: int, recipe: Recipe | None) -> Outcome:
        subject = self.subject
        self._observe(f"measuring {bucket_label(bucket)}" + (f" with {recipe.id}" if recipe is not None else ""))
        job = Job(
            folder=str(subject.folder or work.source),
            spec=subject.spec,
            bucket=bucket,
            device=self.place.device,
            precision=self.options.precision,
            # What the other slots will take must be left over by the call that is measured.
            limit_bytes=max(1, self.limit_bytes - staging_bytes) if self.options.device_memory is not None else 0,
            recipe=recipe,
            buckets=subject.manifest.buckets if subject.manifest is not None else (),
        )
        return work.meter.measure(job)

    def _largest(self, rows: list[BucketPlan]) -> LargestBatch | None:
        """Look for the largest batch, the other symbols at their largest; sizes measured on the way are added."""
        symbol = self.subject.spec.batch_symbol
        if symbol is None or not rows:
            return None
        others = max((r.bucket for r in rows), key=lambda b: math.prod(v for k, v in b.items() if k != symbol))
        known = {r.bucket[symbol]: r for r in rows if {**r.bucket, symbol: 0} == {**others, symbol: 0}}
        for _ in range(_TRIES if self._work is not None else _CHEAP_TRIES):
            guess = self._guess(known, symbol, others)
            if guess is None or guess in known:
                break
            known[guess] = self.row({**others, symbol: guess})
        fitting = [batch for batch, row in known.items() if row.fits]
        batch = max(fitting, default=0)
        rows += [r for b, r in known.items() if r not in rows and (b == batch or r.verdict.reason != "skipped")]
        if not fitting:
            return LargestBatch(0, {}, 0, False, False) if any(map(_is_over, known.values())) else None
        row = known[batch]
        measured = row.measured is not None and row.verdict.ok
        is_end = batch == self.subject.spec.symbols[symbol].high
        return LargestBatch(batch, row.bucket, row.need_bytes or 0, measured, is_end)

    def _guess(self, known: dict[int, BucketPlan], symbol: str, others: Bucket) -> int | None:
        """The next batch to try, or None where the largest is found."""
        span = self.subject.spec.symbols[symbol]
        fits = max((b for b, r in known.items() if r.fits), default=span.low - 1)
        fails = min((b for b, r in known.items() if _is_over(r) and b > fits), default=span.high + 1)
        best = known.get(fits)
        if self._work is not None and best is not None and (best.need_bytes or 0) >= _CLOSE * self.limit_bytes:
            return None
        points = self._points(known, others)
        if fails - fits <= 1 or not points or self._is_stepwise(others):
            return None
        if fails in known and need_at(points, fails) <= self.limit_bytes:
            return (fits + fails) // 2  # it failed against the line: trust the line no further
        # Where the line says that nothing more fits, the next one up tells whether the line is right.
        return max(fits + 1, largest_under(points, self.limit_bytes, fits + 1, fails - 1))

    def _is_stepwise(self, bucket: Bucket) -> bool:
        """A static variant: between its sizes a batch takes what the next larger one does."""
        recipe = self.subject.recipe(bucket)
        return recipe is not None and recipe.static

    def _points(self, known: dict[int, BucketPlan], others: Bucket) -> dict[int, int]:
        """What batches need: measured where two were, else predicted, with a second prediction for the slope."""
        needs = {b: (r.need_bytes, r.verdict.ok) for b, r in known.items() if r.need_bytes is not None}
        measured = {b: need for b, (need, ok) in needs.items() if ok and need is not None}
        if len(measured) > 1:
            return measured
        points = {b: need for b, (need, _) in needs.items() if need is not None}
        symbol = self.subject.spec.batch_symbol
        span = self.subject.spec.symbols[symbol or ""]
        for batch in (span.low, min(span.high, 2 * span.low)):
            if len(points) < 2 and batch not in points:  # noqa: PLR2004 - a line needs two
                found = self.predict({**others, symbol or "": batch})
                if not isinstance(found, str):
                    points[batch] = sum(part.nbytes for part in parts_of(found, self.place))
        return points


def _is_over(row: BucketPlan) -> bool:
    """A size that cannot be served here, for want of memory or because it failed."""
    return row.fits is False or row.failed

"""What would make a size fit, with the bytes that each would take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from onecard.memory.figures import Advice, BucketPlan, LargestBatch, Prediction
from onecard.memory.parts import Place, parts_of
from onecard.spec import Bucket, bucket_label

if TYPE_CHECKING:
    from onecard.memory.planner import Planner

_HALF = {"cpu": "bf16"}
"""The half precision to advise by device; fp16 on a GPU, and slow on most processors."""

_MEASURED_VARIANTS = 2  # each costs a process
_WORTH_IT = 0.95  # what saves less, and still does not fit, is not worth saying


def advise(
    planner: Planner, row: BucketPlan, largest: LargestBatch | None, rows: Sequence[BucketPlan]
) -> tuple[Advice, ...]:
    """What would help at a size that does not fit: first what does, then what gets nearer; the cheapest first.

    Args:
        planner: makes the predictions that are missing.
        row: the size.
        largest: the largest batch that fits, if one was found.
        rows: all sizes of the plan.
    """
    size = planner.subject.run_size(row.bucket)
    found = [
        *_fewer_slots(row),
        *_other_variants(planner, row),
        *_captured(planner, size),
        *(_smaller_batch(row, largest) or _smaller_size(rows)),
        *_half(planner, row, size),
        *_streaming(planner, size),
    ]
    settled = [msgspec.structs.replace(a, fits=a.need_bytes <= planner.limit_bytes) for a in found]
    need = row.need_bytes
    useful = [a for a in settled if need is None or a.fits or a.need_bytes < _WORTH_IT * need]
    return tuple(sorted(useful, key=lambda advice: not advice.fits))


def _fewer_slots(row: BucketPlan) -> list[Advice]:
    if row.need_bytes is None or not row.staging_bytes:
        return []
    what = "Keep one staging slot (--depth 1): copies no longer overlap with computing."
    return [Advice(what, row.need_bytes - row.staging_bytes, _basis(row), False)]


def _other_variants(planner: Planner, row: BucketPlan) -> list[Advice]:
    """Variants of the bundle that had a lower peak when it was made, measured here at this size."""
    manifest = planner.subject.manifest
    own = manifest.variant(row.variant) if manifest is not None else None
    if manifest is None or own is None:
        return []
    lower = [
        entry
        for entry in sorted(manifest.variants, key=lambda entry: entry.measurement.peak_bytes)
        if 0 < entry.measurement.peak_bytes < own.measurement.peak_bytes
    ]
    found = []
    for entry in lower[:_MEASURED_VARIANTS]:
        need = planner.need_of_variant(row, entry.recipe)
        if need is not None:
            found.append(Advice(f"Serve the variant {entry.recipe.id}.", need, "measured", False))
    return sorted(found, key=lambda advice: advice.need_bytes)


def _captured(planner: Planner, size: Bucket) -> list[Advice]:
    own = planner.predict(size)
    if planner.subject.manifest is not None or isinstance(own, str) or own.road == "captured":
        return []
    found = planner.predict(size, road="captured")
    if isinstance(found, str):
        return []
    what = "Optimise it ('onecard optimize'): a compiled graph frees every tensor at its last use."
    return [Advice(what, _total(found, planner.place), "predicted", False)]


def _smaller_batch(row: BucketPlan, largest: LargestBatch | None) -> list[Advice]:
    if largest is None or not largest.batch:
        return []
    what = f"Serve at most {bucket_label(largest.bucket)} (--batch {largest.batch})."
    return [Advice(what, largest.need_bytes, "measured" if largest.verified else "predicted", False)]


def _smaller_size(rows: Sequence[BucketPlan]) -> list[Advice]:
    """The largest size that fits, where no batch does at the longest sequence or the largest picture."""
    fitting = [row for row in rows if row.fits and row.need_bytes is not None]
    best = max(fitting, key=lambda row: row.need_bytes or 0, default=None)
    if best is None:
        return []
    return [Advice(f"Serve sizes of at most {best.label}.", best.need_bytes or 0, _basis(best), False)]


def _half(planner: Planner, row: BucketPlan, size: Bucket) -> list[Advice]:
    if planner.subject.precision(size, planner.options.precision) != "fp32":
        return []
    half = _HALF.get(planner.place.device, "fp16")
    found = planner.predict(size, precision=half)
    if isinstance(found, str):
        return []
    where = f"--precision {half}" if planner.subject.manifest is None else f"'onecard optimize --recipe \"*{half}*\"'"
    return [Advice(f"Run it in {half} ({where}).", _total(found, planner.place), "predicted", False)]


def _streaming(planner: Planner, size: Bucket) -> list[Advice]:
    """The smallest budget for streaming: the layers one after the other, two at a time on the device."""
    from onecard.memory.liveness import largest_layer_bytes

    found = planner.predict(size)
    flat = planner.subject.flat
    if isinstance(found, str) or flat is None:
        return []
    precision = planner.subject.precision(size, planner.options.precision)
    two = min(found.weights_bytes, 2 * largest_layer_bytes(flat, precision))
    what = "Stream the weights from main memory, part by part: at least two of its largest layers are on the device."
    return [Advice(what, _total(found, planner.place) - found.weights_bytes + two, "predicted", False)]


def _total(prediction: Prediction, place: Place) -> int:
    return sum(part.nbytes for part in parts_of(prediction, place))


def _basis(row: BucketPlan) -> str:
    return "measured" if row.measured is not None and row.verdict.ok else "predicted"

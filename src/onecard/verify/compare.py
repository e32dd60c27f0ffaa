"""How far two answers are apart, and how far they may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from onecard.evidence import INCOMPARABLE, OutputError


class Threshold(msgspec.Struct, frozen=True):
    """The largest relative L2 error and the smallest cosine that still count as the same answer."""

    relative_l2: float
    cosine: float


THRESHOLDS = {
    "fp32": Threshold(1e-3, 0.99999),
    "tf32": Threshold(1e-2, 0.9999),
    "fp16": Threshold(2e-2, 0.9995),
    "autocast_fp16": Threshold(2e-2, 0.9995),
    "bf16": Threshold(6e-2, 0.998),
    "autocast_bf16": Threshold(6e-2, 0.998),
    "int8_weights": Threshold(6e-2, 0.998),
    "fp8": Threshold(0.1, 0.995),
    "fp8_tensor": Threshold(0.1, 0.995),
    "fp8_static": Threshold(0.1, 0.995),
    "int8_dynamic": Threshold(0.1, 0.995),
    "int8": Threshold(0.15, 0.985),
    "int4_weights": Threshold(0.2, 0.98),
    "qat": Threshold(0.3, 0.95),
    "sparse24": Threshold(0.3, 0.95),
    "unstructured": Threshold(0.3, 0.95),
    "pruned": Threshold(0.3, 0.95),
}
"""By precision or compression. A deep network multiplies one rounding error (2^-11 in fp16, 2^-9 in bf16) by
about ten to twenty; a wrong kernel is off by far more. A compression changes the model itself: its limit only
tells a changed model from a broken one, and what the change is worth, labelled data must say."""


def threshold_of(relative_l2: float) -> Threshold:
    """The threshold for a user's own limit: an error of e leaves a cosine of about 1 - e²/2, so 1 - e² is given."""
    return Threshold(relative_l2, 1.0 - min(1.0, relative_l2) ** 2)


ROW_FACTOR = 5.0  # one row of many may be this much worse than the whole
_LOST = 0.5  # a part that is off by more, as a share of itself, is not the original's at all
_LEAST_PART = 64  # elements: of fewer a rounding error may be all there is
_QUIET_PART = 0.05  # times the limit and the largest part: what is below that is noise beside it
_FILL = -1e4  # masks fill with this or less
_FAR_BELOW = 100.0  # times the largest of all else


class Part(NamedTuple):
    """A slice of an answer along one dimension.

    Args:
        dimension: of the answer.
        place: along it.
        error: relative, of the slice.
    """

    dimension: int
    place: int
    error: float


def compare(name: str, out: Tensor, ref: Tensor, case: str) -> OutputError:
    """Measure one output against the reference.

    Args:
        name: the output's name.
        out: the variant's answer.
        ref: the reference, same shape, any device.
        case: the name of the case, kept in the result.

    Returns:
        The errors; ``INCOMPARABLE`` where shapes, NaNs or infinities do not stand in the same places. For integer and
        boolean outputs ``relative_l2`` is the share of elements that differ.
    """
    if out.shape != ref.shape:
        return OutputError(name, INCOMPARABLE, -1.0, INCOMPARABLE, None, case)
    if not ref.is_floating_point():
        differ = (out != ref.to(out.device)).double().mean().item() if ref.numel() else 0.0
        return OutputError(name, differ, 1.0 - differ, differ, None, case)
    a, b = out.detach().double(), ref.to(out.device).double()
    special = ~(torch.isfinite(a) & torch.isfinite(b))
    if special.any():
        same = (a == b) | (a.isnan() & b.isnan())
        if not same[special].all():
            return OutputError(name, INCOMPARABLE, -1.0, INCOMPARABLE, None, case)
        a, b = a.masked_fill(special, 0.0), b.masked_fill(special, 0.0)
    top1 = _top1(a, b)
    a, b = _without_fill(a, b)
    return OutputError(name, _relative(a, b), _cosine(a, b), _max_abs(a, b), top1, case)


def rounding_error(single: Mapping[str, Tensor], exact: Mapping[str, Tensor], case: str) -> float | None:
    """The error of answers in fp32 against those in fp64.

    Args:
        single: the answers in fp32, by output.
        exact: the same in fp64.
        case: the name of the case.

    Returns:
        The worst relative L2; None if it is not defined, because every output is zero, not finite or empty.
    """
    telling = [name for name, out in exact.items() if (torch.isfinite(out) & (out != 0)).any()]
    errors = (compare(name, single[name], exact[name], case).relative_l2 for name in telling)
    return max((error for error in errors if error < INCOMPARABLE), default=None)


def worst_row(out: Tensor, ref: Tensor) -> tuple[int, float]:
    """The row (along dimension 0) with the largest relative error, and that error.

    A row whose norm is under a tenth of the average row's is measured against that tenth.
    """
    if out.shape != ref.shape or ref.dim() == 0 or not ref.numel() or not ref.is_floating_point():
        return 0, 0.0
    # Infinities count as nothing, for one would hide the errors of all rows; compare() looks at where they stand.
    a, b = (tensor.reshape(len(ref), -1) for tensor in _finite(out, ref))
    norms = b.norm(dim=1)
    errors = (a - b).norm(dim=1) / norms.clamp_min(0.1 * norms.mean().item() + 1e-30)
    row = int(errors.argmax())
    return row, float(errors[row])


def lost_part(out: Tensor, ref: Tensor, limit: float) -> Part | None:
    """The slice along any dimension but the first that is furthest from the reference's, if it is not its at all.

    A large part of an answer (coordinates beside scores, the other tokens of a long sequence) hides in the norm of the
    whole that a small one is lost. A slice whose norm is under a tenth of the median slice's is measured against that
    tenth, and none against less than ``limit`` lets through beside the largest.

    Args:
        out: the variant's answer.
        ref: the reference, floats of the same shape.
        limit: the largest relative error of the whole.
    """
    if out.shape != ref.shape or not ref.is_floating_point():
        return None
    a, b = _finite(out, ref)
    found: Part | None = None
    for dimension, size in enumerate(ref.shape[1:], 1):
        if size < 2 or ref.numel() // size < _LEAST_PART:  # noqa: PLR2004 - one slice is the whole
            continue
        others = [other for other in range(ref.dim()) if other != dimension]
        norms = torch.linalg.vector_norm(b, dim=others)
        floor = max(0.1 * float(norms.median()), _QUIET_PART * limit * float(norms.max()), 1e-30)
        errors = torch.linalg.vector_norm(a - b, dim=others) / norms.clamp_min(floor)
        place = int(errors.argmax())
        if found is None or errors[place] > found.error:
            found = Part(dimension, place, float(errors[place]))
    return found if found is not None and found.error > max(_LOST, ROW_FACTOR * limit) else None


def lost_class(out: Tensor, ref: Tensor) -> int:
    """Of booleans: how many are wrong, if that is more than half as many as there are of the rarer answer; else 0."""
    if out.shape != ref.shape or ref.dtype != torch.bool:
        return 0
    true = int(ref.sum())
    wrong = int((out != ref.to(out.device)).sum())
    rarer = min(true, ref.numel() - true)
    return wrong if rarer and wrong > _LOST * rarer else 0


def decisive_flips(out: Tensor, ref: Tensor, tolerance: float) -> int:
    """Rows of logits whose largest element moved although the reference was clear about it.

    Clear means that the reference's lead is more than twice ``tolerance`` times the row's largest magnitude.
    """
    if not looks_like_logits(ref) or out.shape != ref.shape:
        return 0
    b = ref.to(out.device).double()
    top = b.topk(2, dim=1).values
    _, magnitudes = _without_fill(out.detach().double(), b)
    clear = (top[:, 0] - top[:, 1]) > 2 * tolerance * magnitudes.abs().amax(dim=1)
    return int((clear & (out.double().argmax(1) != b.argmax(1))).sum())


def looks_like_logits(ref: Tensor) -> bool:
    """True for ``[rows, classes]`` floats with at least two classes."""
    return ref.dim() == 2 and ref.shape[1] > 1 and ref.is_floating_point()  # noqa: PLR2004


def _finite(out: Tensor, ref: Tensor) -> tuple[Tensor, Tensor]:
    """Both in fp64 on one device; what is not finite, or a mask's filling, counts as nothing."""
    a = out.detach().double().nan_to_num(0.0, 0.0, 0.0)
    return _without_fill(a, ref.to(out.device).double().nan_to_num(0.0, 0.0, 0.0))


def _without_fill(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both with 0 where the reference is what masks are filled with, beside which all else would be nothing.

    Only if it is far below everything else there, and the answer is far below it too; else as they are.
    """
    fill = b <= _FILL
    if not fill.any() or fill.all():
        return a, b
    largest = float(b.masked_fill(fill, 0.0).abs().max())
    if largest * _FAR_BELOW > -_FILL or bool((a[fill] > _FILL / 2).any()):
        return a, b
    return a.masked_fill(fill, 0.0), b.masked_fill(fill, 0.0)


def _relative(a: Tensor, b: Tensor) -> float:
    norm = float(b.norm())
    difference = float((a - b).norm())
    return difference / norm if norm > 0 else (0.0 if difference == 0 else INCOMPARABLE)


def _cosine(a: Tensor, b: Tensor) -> float:
    product = float(a.norm()) * float(b.norm())
    if product == 0:
        return 1.0 if float(a.norm()) == float(b.norm()) else 0.0
    return min(1.0, float((a.flatten() @ b.flatten()).item()) / product)


def _max_abs(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if a.numel() else 0.0


def _top1(a: Tensor, b: Tensor) -> float | None:
    if not looks_like_logits(b):
        return None
    return float((a.argmax(1) == b.argmax(1)).double().mean())

"""What is wrong with one output of a variant, if anything: the rule of the gate, for any answer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from onecard.evidence import INCOMPARABLE, OutputError
from onecard.verify.compare import ROW_FACTOR, Threshold, decisive_flips, lost_class, lost_part, worst_row


@dataclass(frozen=True)
class Rule:
    """What an answer is held to.

    Args:
        threshold: how far an output may be from the original's.
        batched: whether the outputs' first dimension is the batch's.
        only_sane: True where a task metric decides, so that outputs need only have the right shape, and be finite where
            the original's are.
    """

    threshold: Threshold
    batched: bool
    only_sane: bool = False


def problem(out: Tensor, ref: Tensor, error: OutputError, rule: Rule, where: str) -> str:
    """What is wrong with an output.

    Args:
        out: the variant's.
        ref: the original's.
        error: what :func:`onecard.verify.compare.compare` gives for both.
        rule: what it is held to.
        where: names the output, at the head of what is said.

    Returns:
        One sentence without its full stop; empty if nothing is wrong.
    """
    limit = rule.threshold
    if tuple(out.shape) != tuple(ref.shape):
        return f"{where} has shape {list(out.shape)}, expected {list(ref.shape)}"
    if error.max_abs >= INCOMPARABLE:
        return f"{where} has NaN or infinity where the original has none, or the reverse"
    if rule.only_sane:
        return ""
    if error.relative_l2 > limit.relative_l2:
        return f"{where}: relative error {error.relative_l2:.2e} exceeds {limit.relative_l2:.0e}"
    if error.cosine < limit.cosine:
        return f"{where}: cosine {error.cosine:.5f} is below {limit.cosine}"
    row, row_error = worst_row(out, ref)
    if rule.batched and row_error > ROW_FACTOR * limit.relative_l2:
        return f"{where}: row {row} has relative error {row_error:.2e}, the rest are right"
    return _hidden(out, ref, limit, where)


def _hidden(out: Tensor, ref: Tensor, limit: Threshold, where: str) -> str:
    """What is wrong with a part of an output that is right on the whole."""
    lost = lost_part(out, ref, limit.relative_l2)
    if lost is not None:
        return (
            f"{where}: part {lost.place} along dimension {lost.dimension} has relative error {lost.error:.2e}, though "
            "the whole is near"
        )
    wrong = lost_class(out, ref)
    if wrong:
        return f"{where}: {wrong} elements are wrong, which is most of the rarer answer's"
    flips = decisive_flips(out, ref, limit.relative_l2)
    if flips:
        return f"{where}: {flips} rows have another largest element where the original was clear"
    return ""

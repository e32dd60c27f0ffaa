"""What is to say of the candidates once they are measured, and once the play-off is over."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from onecard.errors import SearchError
from onecard.evidence import Candidate, Evidence, Verdict
from onecard.measure.card import is_throttled
from onecard.recipe import ORIGINAL
from onecard.search.job import PlayoffResult

_UNSTEADY = (
    "The same input must give the same answer: look for dropout or batch norm that stay in training mode "
    "(model.eval(), and training=self.training), random numbers, state kept from call to call, and inputs changed in "
    "place (x.add_())."
)


def check_original(done: Mapping[str, Candidate]) -> list[str]:
    """See whether there is something to compare with.

    Args:
        done: the candidates by name, the original among them.

    Returns:
        Notes for the report.

    Raises:
        SearchError: the original does not agree with itself, or does not run, and not only because it is too large
            for the device.
    """
    original = done[ORIGINAL.id]
    if original.verdict.reason == "out_of_memory" and any(c.verdict.ok for c in done.values()):
        return ["the original does not fit in the device's memory: variants are compared with its answers alone"]
    if original.verdict.reason == "wrong":  # it was compared with its own answers
        raise SearchError(f"the original does not agree with itself: {original.verdict.detail}.", _UNSTEADY)
    if not original.verdict.ok:
        raise SearchError(
            f"the original itself does not run here: {original.verdict.detail}",
            original.verdict.cure or f"The log is {original.log}.",
        )
    return []


def throttled_notes(playoff: PlayoffResult) -> list[str]:
    """Say at which buckets the card held itself back in the play-off, and why."""
    reasons: dict[str, set[str]] = {}
    for timing in (t for timings in playoff.timings.values() for t in timings):
        if is_throttled(timing.after):
            reasons.setdefault(timing.label or "the one size", set()).update(timing.after.throttle)
    return [
        f"the card slowed itself down in the play-off at {label} ({', '.join(sorted(why))}), twice in a row: "
        "that is its lasting speed under this load, and all finalists met it alike"
        for label, why in reasons.items()
    ]


def settled(candidate: Candidate, evidence: Evidence, chosen: str) -> Candidate:
    """Mark what passed but is no faster than the original at any bucket."""
    if not candidate.verdict.ok or candidate.id in (chosen, ORIGINAL.id):
        return candidate
    pairs = [(evidence.timing(candidate.id, b), evidence.timing(ORIGINAL.id, b)) for b in evidence.buckets or ({},)]
    if all(a is not None and o is not None and a.median_ms >= o.median_ms for a, o in pairs):
        verdict = Verdict("slower", "right, but at no bucket faster than the original")
        return msgspec.structs.replace(candidate, verdict=verdict)
    return candidate

"""What a metric is: a name, its meaning, and where in a subject its figures are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from msgspec import UNSET

from onecard.telemetry.histogram import Distribution

Kind: TypeAlias = Literal["gauge", "counter", "histogram", "untyped"]
Labels: TypeAlias = tuple[str, ...]
Reading: TypeAlias = "Mapping[Labels, float | Distribution]"

UNITS = ("seconds", "bytes", "joules", "watts", "celsius", "hertz", "ratio", "rows")
"""That a metric's name may end with."""

_Subject = TypeVar("_Subject")


@dataclass(frozen=True)
class Metric(Generic[_Subject]):
    """A metric family.

    Args:
        name: with unit and, for a counter, ``_total``.
        kind: of metric.
        help: one sentence, with the unit where the name has none.
        read: what a subject (a snapshot, a model, a process, a device) has of it, by the values of ``labels``; empty
            where it does not know.
        labels: beside those that tell the subject.
    """

    name: str
    kind: Kind
    help: str
    read: Callable[[_Subject], Reading]
    labels: Labels = ()

    @property
    def unit(self) -> str:
        """The last word of the name if it is a unit, else empty."""
        last = self.name.removesuffix("_total").rpartition("_")[2]
        return last if last in UNITS else ""


def bare(read: Callable[[_Subject], Any]) -> Callable[[_Subject], Reading]:
    """A figure without labels of its own; absent where it is not set."""

    def reading(subject: _Subject) -> Reading:
        value = read(subject)
        return {} if value is None or value is UNSET else {(): value}

    return reading

"""How long a run of each size takes: measured as it goes, estimated where nothing was measured yet."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence

Key = tuple[int, ...]
"""A size without its names: one number for every symbol, in the spec's order."""

_WEIGHT = 0.2  # of a new measurement: the last ten count for nine tenths
_OUTLIER = 2.0  # a hiccup of seconds must not refuse requests for minutes, so a sample counts at most this often
_SHORTEST_S = 1e-7  # keeps rows per second finite
_BLIND_S = 1e-3  # before anything was ever measured
_MOST_SIZES = 4096  # remembered; a model with free picture sizes meets a new one in every batch


class Costs:
    """Predicted seconds of a run, by its size.

    A measured size: the exponentially weighted mean of its times. Another size: on the line between its
    neighbours of the same lengths; above the largest in proportion to the rows, below the smallest as that one.
    Lengths that never ran: the dearer of the two sizes next to it in elements, above all of them in proportion.

    Args:
        symbols: the names of all symbols, in the spec's order.
        batch_symbol: the one that counts rows, if there is one.
        initial: sizes and the seconds they were measured at before, for example in the bundle's evidence.
    """

    def __init__(
        self,
        symbols: Sequence[str],
        batch_symbol: str | None = None,
        initial: Iterable[tuple[Mapping[str, int], float]] = (),
    ) -> None:
        self._symbols = tuple(symbols)
        self._batch = None if batch_symbol is None else self._symbols.index(batch_symbol)
        self._known: dict[Key, float] = {}  # the longest unseen first
        self._curves: dict[Key, list[tuple[int, Key]]] = {}  # lengths to (rows, key), ascending
        self._elements: list[tuple[int, Key]] = []  # ascending
        self.version = 0  # changes with every measurement
        for size, seconds in initial:
            self.observe(size, seconds)

    def key(self, size: Mapping[str, int]) -> Key:
        """The numbers of a size, in the spec's order."""
        return tuple([size[name] for name in self._symbols])

    def split(self, key: Key) -> tuple[int, Key]:
        """The rows and the lengths in a size; one row where there is no batch symbol."""
        at = self._batch
        return (1, key) if at is None else (key[at], key[:at] + key[at + 1 :])

    def with_rows(self, key: Key, rows: int) -> Key:
        """The same size with another number of rows; the same where there is no batch symbol."""
        at = self._batch
        return key if at is None else (*key[:at], rows, *key[at + 1 :])

    def seconds(self, key: Key) -> float:
        """What a run of this size is expected to take; always above 0."""
        known = self._known.get(key)
        if known is not None:
            return known
        rows, lengths = self.split(key)
        curve = self._curves.get(lengths)
        return self._on_curve(curve, rows) if curve else self._guess(math.prod(key))

    def has_lengths(self, key: Key) -> bool:
        """Whether any size of the same lengths was measured, so that :meth:`seconds` is more than a guess."""
        return self.split(key)[1] in self._curves

    def observe(self, size: Mapping[str, int], seconds: float) -> None:
        """Take a measurement in.

        Args:
            size: what was run, padding included.
            seconds: how long it took; what is no time at all (negative, not finite) is passed over.
        """
        if not (math.isfinite(seconds) and seconds >= 0):
            return
        key = self.key(size)
        seconds = max(seconds, _SHORTEST_S)
        before = self._known.pop(key, None)
        if before is None:
            self._add(key)
        else:
            seconds = before + _WEIGHT * (min(seconds, _OUTLIER * before) - before)
        self._known[key] = seconds
        self.version += 1

    def _add(self, key: Key) -> None:
        if len(self._known) >= _MOST_SIZES:
            self._forget(next(iter(self._known)))
        rows, lengths = self.split(key)
        insort(self._curves.setdefault(lengths, []), (rows, key))
        insort(self._elements, (math.prod(key), key))

    def _forget(self, key: Key) -> None:
        del self._known[key]
        rows, lengths = self.split(key)
        curve = self._curves[lengths]
        curve.remove((rows, key))
        if not curve:
            del self._curves[lengths]
        del self._elements[bisect_left(self._elements, (math.prod(key), key))]

    def _on_curve(self, curve: list[tuple[int, Key]], rows: int) -> float:
        at = bisect_left(curve, (rows, ()))
        if at == 0:
            return self._known[curve[0][1]]
        below, key = curve[at - 1]
        low = self._known[key]
        if at == len(curve):
            return low * rows / below
        above, key = curve[at]
        return low + (self._known[key] - low) * (rows - below) / (above - below)

    def _guess(self, elements: int) -> float:
        if not self._elements:
            return _BLIND_S
        at = bisect_left(self._elements, (elements, ()))
        if at == len(self._elements):
            most, key = self._elements[-1]
            return self._known[key] * elements / most
        return max(self._known[key] for _, key in self._elements[max(0, at - 1) : at + 1])

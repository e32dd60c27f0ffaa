"""Latencies counted as HdrHistogram counts them, and written in its format, which its tools for any language read.

Values are whole nanoseconds up to one hour, kept to three significant digits: buckets of 1024 equal steps, each bucket
twice as wide as the one before. Source: https://github.com/HdrHistogram/HdrHistogram, ``AbstractHistogram.java``
(``fillBufferFromCountsArray``, V2 encoding: zero runs and counts as ZigZag LEB128, compressed by zlib).
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from onecard.errors import DataError

Seconds = npt.NDArray[np.float64]

_DIGITS = 3
_HALF_BITS = 10  # 1024 steps a bucket: the first power of two above 10 ** 3
_HALF = 1 << _HALF_BITS
_HIGHEST_NS = 3_600_000_000_000
_COOKIE, _COMPRESSED_COOKIE = 0x1C849313, 0x1C849314
_HEADER = struct.Struct(">iiiiqqd")
_MORE, _LOW_BITS = 0x80, 0x7F


class Histogram:
    """Counts of latencies.

    Args:
        seconds: latencies to count; those above one hour count as one hour.
    """

    def __init__(self, seconds: Seconds | None = None) -> None:
        self._counts = np.zeros(_index(np.array([_HIGHEST_NS], np.int64))[0] + 1, np.int64)
        self.total = 0
        self._sum_s = 0.0
        self._max_s = 0.0
        if seconds is not None:
            self.add(seconds)

    def add(self, seconds: Seconds) -> None:
        """Count more of them."""
        if not len(seconds):
            return
        ns = np.clip(np.rint(seconds * 1e9), 0, _HIGHEST_NS).astype(np.int64)
        self._counts += np.bincount(_index(ns), minlength=len(self._counts))
        self.total += len(ns)
        self._sum_s += float(seconds.sum())
        self._max_s = max(self._max_s, float(seconds.max()))

    @property
    def mean_s(self) -> float:
        """NaN if there are none."""
        return self._sum_s / self.total if self.total else math.nan

    def percentile_s(self, percentile: float) -> float:
        """The latency that so many percent do not exceed, to three digits; NaN if there are none."""
        if not self.total:
            return math.nan
        rank = max(1, math.ceil(percentile / 100 * self.total - 1e-9))
        place = int(np.searchsorted(np.cumsum(self._counts), rank))
        return min(_highest_of(place) / 1e9, self._max_s)

    def buckets(self) -> Iterator[tuple[float, int]]:
        """The latency and the count of each step that is not empty, ascending."""
        for place in np.flatnonzero(self._counts):
            yield min(_highest_of(int(place)) / 1e9, self._max_s), int(self._counts[place])

    def encode(self) -> str:
        """As HdrHistogram's compressed V2 format in base64."""
        used = np.flatnonzero(self._counts)
        payload = bytearray()
        behind = 0
        for place in used:
            if place > behind:
                payload += _zigzag(behind - int(place))  # negative: so many empty steps
            payload += _zigzag(int(self._counts[place]))
            behind = int(place) + 1
        whole = _HEADER.pack(_COOKIE, len(payload), 0, _DIGITS, 1, _HIGHEST_NS, 1.0) + payload
        packed = zlib.compress(whole)
        return base64.b64encode(struct.pack(">ii", _COMPRESSED_COOKIE, len(packed)) + packed).decode()

    @classmethod
    def decode(cls, text: str) -> Histogram:
        """Read what :meth:`encode` wrote. Its mean and maximum are those of the steps.

        Raises:
            DataError: it is something else.
        """
        try:
            packed = base64.b64decode(text, validate=True)
            whole = zlib.decompress(packed[8:])
            cookie, length, _, digits, lowest, highest, _ = _HEADER.unpack_from(whole)
            if (cookie, digits, lowest, highest) != (_COOKIE, _DIGITS, 1, _HIGHEST_NS):
                raise ValueError("it has other settings")
            found = cls()
            place = 0
            for number in _numbers(whole[_HEADER.size : _HEADER.size + length]):
                if number >= 0:
                    found._counts[place] = number
                place += 1 if number >= 0 else -number
        except (ValueError, struct.error, zlib.error, IndexError) as error:
            raise DataError(f"this is no histogram of latencies: {error}.") from error
        places = np.flatnonzero(found._counts)
        found.total = int(found._counts.sum())
        found._max_s = _highest_of(int(places[-1])) / 1e9 if len(places) else 0.0
        found._sum_s = sum(_highest_of(int(place)) / 1e9 * int(found._counts[place]) for place in places)
        return found


def _index(ns: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The step of each value: the first 2048 of one nanosecond each, then 1024 for each doubling."""
    _, exponent = np.frexp(ns.astype(np.float64))  # ns < 2 ** exponent, exact: an hour has 42 bits
    bucket = np.maximum(exponent.astype(np.int64) - (_HALF_BITS + 1), 0)
    found: npt.NDArray[np.int64] = (bucket << _HALF_BITS) + (ns >> bucket)
    return found


def _highest_of(place: int) -> int:
    """The highest value, in nanoseconds, that falls into a step."""
    bucket = max((place >> _HALF_BITS) - 1, 0)
    step = place - (bucket << _HALF_BITS)
    return ((step + 1) << bucket) - 1


def _zigzag(number: int) -> bytes:
    left = number << 1 if number >= 0 else (-number << 1) - 1
    found = bytearray()
    while left >= _MORE:
        found.append(left & _LOW_BITS | _MORE)
        left >>= 7
    found.append(left)
    return bytes(found)


def _numbers(data: bytes) -> Iterator[int]:
    value = shift = 0
    for byte in data:
        value |= (byte & _LOW_BITS) << shift
        shift += 7
        if byte < _MORE:
            yield value >> 1 if not value & 1 else -((value + 1) >> 1)
            value = shift = 0

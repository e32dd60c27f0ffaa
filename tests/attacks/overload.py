"""Far more load than the server can bear: ``python -m tests.attacks.overload --seconds 60``.

A server that is asked for four times what it can do must go on doing what it can: answers within their deadlines at the
rate of its best moment, and quick, honest refusals of the rest.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass

from tests.attacks.attacked import Attacked, attacked
from tests.attacks.loops import run
from tests.attacks.null_server import NullBundle
from tests.attacks.open_load import OpenLoad, Sample, outcomes, percentile

REFUSALS = frozenset({429, 503, 504})
MUST_SAY_WHEN = frozenset({429, 503})
"""With Retry-After; one whose deadline cannot be kept need not come back."""


@dataclass(frozen=True)
class Setting:
    """What is done to which server.

    Args:
        seconds: of overload.
        peak_seconds: of each of the loads before, at which the peak is found.
        delay_ms: how long a batch takes.
        batch: its rows.
        deadline_ms: of each request.
        way_ms: from the client to the engine and back, which the server does not see: an answer is in time if it is
            with the client so much after the deadline.
        times: the overload, in capacities.
        settle_s: within which the last of a load must be answered, however late.
    """

    seconds: float = 60.0
    peak_seconds: float = 10.0
    delay_ms: float = 10.0
    batch: int = 8
    deadline_ms: float = 250.0
    way_ms: float = 10.0
    times: float = 4.0
    settle_s: float = 10.0

    @property
    def capacity_s(self) -> float:
        """Rows a second, if every batch is full and nothing lies between them."""
        return self.batch / self.delay_ms * 1e3

    @property
    def in_time_ms(self) -> float:
        return self.deadline_ms + self.way_ms

    @property
    def bundle(self) -> NullBundle:
        return NullBundle((f"x: float32[B,4], B=1..{self.batch}",), self.delay_ms, (self.batch,))


@dataclass(frozen=True)
class Loaded:
    """What came of one load.

    Args:
        offered_s: requests a second that were sent.
        goodput_s: right answers within their deadlines, a second.
        p99_ms: of the answered, from sending to the answer.
        behind_ms: by how much the attacker sent later than it should, at worst in nine cases of ten. Above a few
            milliseconds the machine is too busy with other things for anything here to be true.
        counts: of the outcomes.
        faults: what must not be.
    """

    offered_s: float
    goodput_s: float
    p99_ms: float
    behind_ms: float
    counts: dict[str, int]
    faults: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"offered {self.offered_s:7.0f}/s  goodput {self.goodput_s:7.0f}/s  p99 {self.p99_ms:6.1f} ms  "
            f"behind {self.behind_ms:.1f} ms  "
            f"{self.counts} {' '.join(self.faults)}"
        )


def load(port: int, rate_s: float, seconds: float, setting: Setting) -> Loaded:
    """Send for a while, and look at what came."""
    source = OpenLoad(port, rate_s, round(setting.deadline_ms * 1e3))

    async def main() -> None:
        await source.run(seconds)
        await source.settle(setting.settle_s)

    run(main())
    samples = source.samples
    answered = [s for s in samples if s.outcome == "answered"]
    in_time = [s for s in answered if s.latency_s * 1e3 <= setting.in_time_ms]
    span_s = max(s.due_s for s in samples) - samples[0].due_s
    p99_ms = percentile([s.latency_s * 1e3 for s in answered], 0.99)
    behind_ms = percentile([(s.sent_s - s.due_s) * 1e3 for s in samples], 0.9)
    return Loaded(
        len(samples) / span_s, len(in_time) / span_s, p99_ms, behind_ms, outcomes(samples), tuple(_faults(samples))
    )


def _faults(samples: list[Sample]) -> list[str]:
    found = []
    if left := [s for s in samples if s.outcome in ("lost", "wrong", "unreachable")]:
        found.append(f"{len(left)} were not answered as they should, the first: {left[0]}.")
    refused = [s for s in samples if s.outcome == "refused"]
    if strange := {s.status for s in refused} - REFUSALS:
        found.append(f"refused with {strange}.")
    if any(s.status in MUST_SAY_WHEN and not s.retry_after for s in refused):
        found.append("refused without saying when to come back.")
    return found


@dataclass(frozen=True)
class Overloaded:
    """What an overload did.

    Args:
        peak: the best of the loads around the capacity.
        over: the overload.
        resident_mib: of the server before and after the overload.
    """

    peak: Loaded
    over: Loaded
    resident_mib: tuple[float, float]

    @property
    def kept(self) -> float:
        """Which share of the peak's goodput was left."""
        return self.over.goodput_s / self.peak.goodput_s if self.peak.goodput_s else math.nan


def overload(server: Attacked, setting: Setting) -> Overloaded:
    """Find the peak, warm up the refusals, and overload."""
    capacity_s = setting.capacity_s
    peaks = [load(server.port, capacity_s * times, setting.peak_seconds, setting) for times in (1.0, 1.2)]
    for peak in peaks:
        print("at its peak  ", peak)
    warm = load(server.port, capacity_s * setting.times, setting.peak_seconds, setting)
    print("warm-up      ", warm)
    before = server.resident_bytes() / (1 << 20)
    over = load(server.port, capacity_s * setting.times, setting.seconds, setting)
    print("overload     ", over)
    return Overloaded(max(peaks, key=lambda peak: peak.goodput_s), over, (before, server.resident_bytes() / (1 << 20)))


def main() -> int:
    """Attack a server of its own, and print the counts."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--seconds", type=float, default=60.0)
    words.add_argument("--peak-seconds", type=float, default=10.0)
    words.add_argument("--delay-ms", type=float, default=10.0)
    words.add_argument("--times", type=float, default=4.0)
    given = words.parse_args()
    setting = Setting(given.seconds, given.peak_seconds, given.delay_ms, times=given.times)
    print(f"capacity {setting.capacity_s:.0f} rows/s, deadline {setting.deadline_ms:.0f} ms")
    with attacked({"tag": setting.bundle}) as server:
        found = overload(server, setting)
    before, after = found.resident_mib
    print(f"goodput kept {found.kept:.1%}, resident {before:.0f} MiB -> {after:.0f} MiB")
    right = found.kept >= 0.95 and found.over.p99_ms <= setting.in_time_ms and not found.over.faults
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())

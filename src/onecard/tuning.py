"""What tuning found: throughput and latency over batch sizes and lanes, the knee, the best setting under each limit.

Plain data without torch; the bundle carries it as ``tuning.json``, the report draws it, the engine starts with it.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from onecard.environment import Environment
from onecard.errors import BundleError

TUNING_FORMAT = 1
MAX_TUNING_BYTES = 4 << 20

_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
_Amount = Annotated[float, msgspec.Meta(ge=0, le=1e15)]
_Text = Annotated[str, msgspec.Meta(max_length=20_000)]


class LoadPoint(msgspec.Struct, frozen=True):
    """One batch size on one number of lanes, with every lane kept busy, from host memory to host memory.

    Args:
        batch: rows of a batch.
        lanes: copies of the model side by side.
        rows_per_s: answered by all lanes together.
        p50_ms: of a batch, from its launch to its answers, those before it in the same lane included.
        p99_ms: likewise.
        batches: how many were measured.
        failed: why it has no figures, or empty.
    """

    batch: _Size
    lanes: _Size
    rows_per_s: _Amount = 0.0
    p50_ms: _Amount = 0.0
    p99_ms: _Amount = 0.0
    batches: _Count = 0
    failed: _Text = ""

    @property
    def service_ms(self) -> float:
        """Time between two batches of a lane: no request that shares such a batch is answered sooner."""
        return 1e3 * self.batch * self.lanes / self.rows_per_s if self.rows_per_s else 0.0


class Setting(msgspec.Struct, frozen=True):
    """How to run an engine for the most rows a second under a limit, and what its confirming run gave.

    Args:
        p99_limit_ms: of a request, from when it was due to be sent to its answer.
        batch: most rows of a batch.
        max_delay_ms: how long a request may wait for others.
        lanes: copies of the model.
        rows_per_s: answered in the confirming run, requests arriving at random (Poisson).
        p50_ms: of its requests.
        p99_ms: likewise.
        requests: how many it had.
        batch_mean: rows of its batches on average.
        failed: why there is no such setting, or why it cannot be relied on; empty if it holds.
    """

    p99_limit_ms: _Amount
    batch: _Count = 0
    max_delay_ms: _Amount = 0.0
    lanes: _Count = 0
    rows_per_s: _Amount = 0.0
    p50_ms: _Amount = 0.0
    p99_ms: _Amount = 0.0
    requests: _Count = 0
    batch_mean: _Amount = 0.0
    failed: _Text = ""


class Tuning(msgspec.Struct, frozen=True):
    """All that a tuning found.

    Args:
        device: where it ran.
        environment: the machine and the versions.
        points: the curve, by lanes and then by batch.
        knee: the point behind which larger batches gain little; None if no point was measured.
        settings: one for each limit, the tightest first.
        request_rows: rows of every request that the settings were found with.
        lengths: sizes of the symbols other than the batch's, which all was measured at.
        command: that started it.
        started: when, ISO 8601.
        seconds: that it took.
        notes: what else the user should know.
        format: of the file.
        ingest: raw forms in which all was sent, in the words of ``onecard tune --ingest``; an engine with this tuning
            takes them.
    """

    device: _Text
    environment: Environment
    points: Annotated[tuple[LoadPoint, ...], msgspec.Meta(max_length=10_000)]
    knee: LoadPoint | None
    settings: Annotated[tuple[Setting, ...], msgspec.Meta(max_length=1_000)]
    request_rows: _Size = 1
    lengths: dict[str, _Size] = {}
    command: _Text = ""
    started: _Text = ""
    seconds: _Amount = 0.0
    notes: Annotated[tuple[_Text, ...], msgspec.Meta(max_length=1_000)] = ()
    format: int = TUNING_FORMAT
    ingest: Annotated[tuple[_Text, ...], msgspec.Meta(max_length=1_000)] = ()

    @property
    def measured(self) -> tuple[LoadPoint, ...]:
        """The points that have figures."""
        return tuple(point for point in self.points if not point.failed)

    def setting(self, p99_limit_ms: float) -> Setting | None:
        """The setting with the loosest limit that is no looser than this one, if any holds."""
        held = [s for s in self.settings if not s.failed and s.p99_limit_ms <= p99_limit_ms]
        return max(held, key=lambda s: s.p99_limit_ms, default=None)


class _Header(msgspec.Struct, frozen=True):
    """What can be read of the file in any format."""

    format: int = 0


def tuning_to_bytes(tuning: Tuning) -> bytes:
    """The file, as indented JSON in UTF-8."""
    return msgspec.json.format(msgspec.json.encode(tuning), indent=1)


def tuning_from_bytes(data: bytes, where: str = "tuning.json") -> Tuning:
    """Read the file.

    Args:
        data: its bytes; nothing in them is trusted.
        where: named in the message.

    Raises:
        BundleError: too large, of a newer format, or not what the format says.
    """
    if len(data) > MAX_TUNING_BYTES:
        raise BundleError(f"{where} has more than {MAX_TUNING_BYTES >> 20} MiB, which no tuning needs.", _CURE)
    try:
        version = msgspec.json.decode(data, type=_Header).format
        if version > TUNING_FORMAT:
            raise BundleError(
                f"{where} has format {version}; this onecard reads up to {TUNING_FORMAT}.",
                "Upgrade: pip install -U onecard.",
            )
        return msgspec.json.decode(data, type=Tuning)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{where} does not follow the format: {error}.", _CURE) from error


_CURE = "Tune the bundle again: onecard tune."

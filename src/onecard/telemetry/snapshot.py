"""What a server tells of itself at one moment: the body of ``GET /v2/onecard/state``, and the source of all metrics.

Whatever is counted is counted since the process began, so that any reader makes rates and percentiles of its own from
two snapshots. What is not known is left out of the JSON: it is never zero or null.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from onecard.errors import DataError
from onecard.telemetry.histogram import Distribution

Sensors: TypeAlias = dict[str, Any]
"""A sample as :func:`onecard.telemetry.card_sample.card_state` gives it: only the sensors that exist, with units in
their names; and ``device``, which it was taken of (``cpu``, ``cuda:0``)."""

CLIENT_REASONS = ("bad_input", "cancelled")
"""Why a request failed that is its client's doing."""

REFUSAL_REASONS = ("refused_queue_full", "refused_deadline", "refused_not_ready")
"""Why a request was turned away at once; each begins with ``refused_``."""

SERVER_REASONS = ("deadline", "engine_error", "out_of_memory")
"""Why a request that was let in got no answer."""

FAILURE_REASONS = (*CLIENT_REASONS, *REFUSAL_REASONS, *SERVER_REASONS)
"""The usual keys of :attr:`ModelFigures.failures`; metrics show these also while they are 0."""

HISTOGRAMS = ("request_s", "queue_s", "batch_s", "copy_in_s", "compute_s", "copy_out_s")
"""The keys of :attr:`ModelFigures.histograms`, all in seconds: of requests, from coming in to being answered; of
requests, waiting for a batch; of batches, from being formed to their answers being the callers'; and of these copying
in, the model alone, and copying out."""

_ADDED = (
    *("queue_requests", "queue_bytes", "in_flight", "admitted", "requests"),
    *("rows", "padded_rows", "batches"),
)
_TAKEN_ONCE = ("variant", "reason", "device", "inputs", "outputs", "memory_bytes", "request_stages_s")
_TAKEN_WHERE_SET = (
    *("variants", "skipped_variants", "queue_limit_requests", "queue_limit_bytes"),
    *("p99_target_s", "load_s"),
)
_Value = TypeVar("_Value")


class ServerFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The server as a whole.

    Args:
        version: of onecard.
        started_s: when, in Unix time.
        ready: whether it takes requests.
        live: whether it runs at all.
        fronts: processes with sockets.
        engine_restarts: how often the engine's process was started again.
        open_connections: of clients.
        platform: operating system and processor.
    """

    version: str = ""
    started_s: float = 0.0
    ready: bool = True
    live: bool = True
    fronts: int = 1
    engine_restarts: int = 0
    open_connections: int = 0
    platform: str = ""


class TensorFigures(msgspec.Struct, frozen=True):
    """An input or output as the protocol's metadata says it; a size that may vary is -1."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class SentinelFigures(msgspec.Struct, frozen=True):
    """What the sentinel found, which asks the original a share of the questions again.

    Args:
        checked: answers compared.
        wrong: of these, those beyond the threshold.
        difference: relative differences found.
    """

    checked: int = 0
    wrong: int = 0
    difference: Distribution = Distribution()


class ModelFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One version of a model.

    Args:
        name: in the URL.
        version: of the model in this server.
        variant: the recipe that serves.
        variants: recipe by bucket, where they differ.
        skipped_variants: better ones that the bundle has but that could not run here or answered wrongly.
        state: READY, LOADING, UNLOADING or UNAVAILABLE.
        reason: for the state.
        device: where it runs.
        inputs: of the model.
        outputs: of the model.
        queue_requests: that wait now.
        queue_bytes: of their inputs.
        queue_limit_requests: most that may wait.
        queue_limit_bytes: likewise.
        in_flight: requests that came in and are not answered yet, those in the queue included.
        p99_target_s: the latency that it is to keep, if one was named.
        admitted: requests let in.
        requests: answered well.
        failures: not answered well, by reason: see :data:`FAILURE_REASONS`.
        rows: answered.
        padded_rows: run for nothing.
        batches: run.
        histograms: see :data:`HISTOGRAMS`.
        batch_rows: sizes of the batches, without padding.
        request_stages_s: seconds of ``copy_in``, ``compute`` and ``copy_out``, those of a batch counted once for each
            of its requests, as Triton does.
        load_s: how long loading took, self-test and warm-up included.
        memory_bytes: on the device, by kind: ``weights``, ``reserved``, ``peak``.
        sentinel: left out while it is off.
    """

    name: str
    version: str
    variant: str = ""
    variants: dict[str, str] | UnsetType = UNSET
    skipped_variants: int | UnsetType = UNSET
    state: str = "READY"
    reason: str = ""
    device: str = ""
    inputs: tuple[TensorFigures, ...] = ()
    outputs: tuple[TensorFigures, ...] = ()
    queue_requests: int = 0
    queue_bytes: int = 0
    queue_limit_requests: int | UnsetType = UNSET
    queue_limit_bytes: int | UnsetType = UNSET
    in_flight: int = 0
    p99_target_s: float | UnsetType = UNSET
    admitted: int = 0
    requests: int = 0
    failures: dict[str, int] = {}
    rows: int = 0
    padded_rows: int = 0
    batches: int = 0
    histograms: dict[str, Distribution] = {}
    batch_rows: Distribution = Distribution()
    request_stages_s: dict[str, float] = {}
    load_s: float | UnsetType = UNSET
    memory_bytes: dict[str, int] = {}
    sentinel: SentinelFigures | UnsetType = UNSET


class ProcessFigures(msgspec.Struct, frozen=True):
    """One of the server's processes.

    Args:
        role: ``front`` or ``engine``; with several fronts, ``front-0`` and so on.
        started_s: when, in Unix time.
        cpu_s: used, user and system together.
        resident_bytes: of main memory.
        threads: that it has.
        open_files: descriptors, sockets included.
    """

    role: str
    started_s: float
    cpu_s: float
    resident_bytes: int
    threads: int
    open_files: int


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """All of it.

    Args:
        time_s: when, in Unix time.
        server: as a whole.
        models: by name and version.
        card: the sensors of the device that serves.
        host: the sensors of the processor, where the card is another.
        processes: of the server.
    """

    time_s: float
    server: ServerFigures = ServerFigures()
    models: tuple[ModelFigures, ...] = ()
    card: Sensors = {}
    host: Sensors | UnsetType = UNSET
    processes: tuple[ProcessFigures, ...] = ()


def encode(snapshot: Snapshot) -> bytes:
    """As JSON."""
    return msgspec.json.encode(snapshot)


def decode(data: bytes) -> Snapshot:
    """Read what :func:`encode` wrote; fields of a newer onecard are passed over.

    Raises:
        DataError: it is something else.
    """
    try:
        return msgspec.json.decode(data, type=Snapshot)
    except msgspec.MsgspecError as error:
        raise DataError(f"this is not the state of an onecard server: {error}.", "Check the address.") from error


def merge(parts: Sequence[Snapshot]) -> Snapshot:
    """The snapshots of a server's processes as one.

    Each process tells what it alone knows and leaves the rest at its default: a front its requests and connections, the
    engine its queues, batches and card. Counts, histograms, queues and what is in flight are added up. What all fronts
    see alike (restarts, states, limits) is taken once, from the first part that says it.

    Raises:
        DataError: no parts, or histograms whose bounds differ.
    """
    if not parts:
        raise DataError("there are no snapshots to merge.")
    models: dict[tuple[str, str], list[ModelFigures]] = {}
    for part in parts:
        for model in part.models:
            models.setdefault((model.name, model.version), []).append(model)
    return Snapshot(
        time_s=max(part.time_s for part in parts),
        server=_merged_server([part.server for part in parts]),
        models=tuple(_merged_model(group) for group in models.values()),
        card=_first([part.card for part in parts]),
        host=_first_set([part.host for part in parts]),
        processes=tuple(process for part in parts for process in part.processes),
    )


def _merged_server(servers: Sequence[ServerFigures]) -> ServerFigures:
    return ServerFigures(
        version=_first([server.version for server in servers]),
        started_s=min((server.started_s for server in servers if server.started_s), default=0.0),
        ready=all(server.ready for server in servers),
        live=all(server.live for server in servers),
        fronts=max(server.fronts for server in servers),
        engine_restarts=max(server.engine_restarts for server in servers),
        open_connections=sum(server.open_connections for server in servers),
        platform=_first([server.platform for server in servers]),
    )


def _merged_model(group: Sequence[ModelFigures]) -> ModelFigures:
    sentinels = [model.sentinel for model in group if not isinstance(model.sentinel, UnsetType)]
    merged: dict[str, Any] = {
        **{name: sum(getattr(model, name) for model in group) for name in _ADDED},
        **{name: _first([getattr(model, name) for model in group]) for name in _TAKEN_ONCE},
        **{name: _first_set([getattr(model, name) for model in group]) for name in _TAKEN_WHERE_SET},
    }
    return msgspec.structs.replace(
        group[0],
        **merged,
        state=next((model.state for model in group if model.state != "READY"), "READY"),
        failures=_merged_failures(group),
        histograms=_merged_histograms([model.histograms for model in group]),
        batch_rows=_added(model.batch_rows for model in group),
        sentinel=_merged_sentinel(sentinels),
    )


def _merged_failures(group: Sequence[ModelFigures]) -> dict[str, int]:
    failures: Counter[str] = Counter()
    for model in group:
        failures.update(model.failures)
    return dict(failures)


def _merged_histograms(parts: Sequence[Mapping[str, Distribution]]) -> dict[str, Distribution]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: _added(part[name] for part in parts if name in part) for name in names}


def _merged_sentinel(sentinels: Sequence[SentinelFigures]) -> SentinelFigures | UnsetType:
    if not sentinels:
        return UNSET
    return SentinelFigures(
        sum(sentinel.checked for sentinel in sentinels),
        sum(sentinel.wrong for sentinel in sentinels),
        _added(sentinel.difference for sentinel in sentinels),
    )


def _added(distributions: Iterable[Distribution]) -> Distribution:
    total = Distribution()
    for distribution in distributions:
        total = total.plus(distribution)
    return total


def _first(values: Sequence[_Value]) -> _Value:
    """The first that is not empty; the first of all, if all are."""
    return next((value for value in values if value), values[0])


def _first_set(values: Sequence[_Value | UnsetType]) -> _Value | UnsetType:
    return next((value for value in values if value is not UNSET), UNSET)

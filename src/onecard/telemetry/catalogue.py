"""Every metric of the server by name: what it means, what it is labelled with, and where in a snapshot it comes from.

Names follow Prometheus' conventions: base units, ``_total`` for counters. Labels hold what the server itself names
(models, recipes, devices, reasons from fixed lists), never what a client sends.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from onecard.telemetry.catalogue_card import CARD_METRICS
from onecard.telemetry.metric import Labels, Metric, Reading, bare
from onecard.telemetry.snapshot import FAILURE_REASONS, ModelFigures, ProcessFigures, SentinelFigures, Snapshot

STATES = ("READY", "LOADING", "UNLOADING", "UNAVAILABLE")

_REASON = re.compile(r"[a-z0-9_]{1,40}")


def _histogram(key: str) -> Callable[[ModelFigures], Reading]:
    return bare(lambda model: model.histograms.get(key))


def _failures(model: ModelFigures) -> Reading:
    """All usual reasons, also at 0: Prometheus does not see the first of a series that begins at 1."""
    counts: dict[Labels, float] = dict.fromkeys(((reason,) for reason in FAILURE_REASONS), 0.0)
    for reason, count in model.failures.items():
        key = (reason if _REASON.fullmatch(reason) else "other",)
        counts[key] = counts.get(key, 0.0) + count
    return counts


def _variants(model: ModelFigures) -> Reading:
    if isinstance(model.variants, dict):
        return {(bucket, variant, model.device): 1.0 for bucket, variant in model.variants.items()}
    return {("any", model.variant, model.device): 1.0} if model.variant else {}


def _sentinel(read: Callable[[SentinelFigures], Any]) -> Callable[[ModelFigures], Reading]:
    return bare(lambda model: read(model.sentinel) if isinstance(model.sentinel, SentinelFigures) else None)


SERVER_METRICS: tuple[Metric[Snapshot], ...] = (
    Metric(
        "onecard_build_info",
        "gauge",
        "Always 1; the labels say which onecard runs where.",
        lambda snapshot: {(snapshot.server.version, snapshot.server.platform): 1.0},
        ("version", "platform"),
    ),
    Metric("onecard_server_live", "gauge", "1 while the server runs.", bare(lambda s: float(s.server.live))),
    Metric(
        "onecard_server_ready",
        "gauge",
        "1 while the server takes requests: every model proved itself and it is not ending.",
        bare(lambda s: float(s.server.ready)),
    ),
    Metric(
        "onecard_server_start_time_seconds",
        "gauge",
        "When the server started, Unix time.",
        bare(lambda s: s.server.started_s),
    ),
    Metric("onecard_server_fronts", "gauge", "Processes with sockets.", bare(lambda s: s.server.fronts)),
    Metric(
        "onecard_server_open_connections",
        "gauge",
        "Connections of clients that are open now.",
        bare(lambda s: s.server.open_connections),
    ),
    Metric(
        "onecard_engine_restarts_total",
        "counter",
        "How often the engine's process died or hung and was started again.",
        bare(lambda s: s.server.engine_restarts),
    ),
)
"""Of the whole server; no labels but their own."""

MODEL_METRICS: tuple[Metric[ModelFigures], ...] = (
    Metric(
        "onecard_model_state",
        "gauge",
        "1 for the state that the model is in, 0 for the others.",
        lambda model: {(state,): float(state == model.state) for state in STATES},
        ("state",),
    ),
    Metric(
        "onecard_model_variant_info",
        "gauge",
        "Always 1; the recipe that serves each bucket ('any' where one serves all), and where it runs.",
        _variants,
        ("bucket", "variant", "device"),
    ),
    Metric(
        "onecard_model_skipped_variants",
        "gauge",
        "Better variants of the bundle that could not run here or failed the self-test, so that the next one serves.",
        bare(lambda m: m.skipped_variants),
    ),
    Metric(
        "onecard_model_load_seconds",
        "gauge",
        "How long loading took, self-test and warm-up included.",
        bare(lambda m: m.load_s),
    ),
    Metric(
        "onecard_model_memory_bytes",
        "gauge",
        "Memory of the device by kind: weights, reserved, peak.",
        lambda model: {(kind,): size for kind, size in model.memory_bytes.items()},
        ("kind",),
    ),
    Metric(
        "onecard_model_latency_target_seconds",
        "gauge",
        "The p99 latency that the model is to keep, if one was named.",
        bare(lambda m: m.p99_target_s),
    ),
    Metric("onecard_requests_admitted_total", "counter", "Requests that were let in.", bare(lambda m: m.admitted)),
    Metric("onecard_requests_answered_total", "counter", "Requests answered well.", bare(lambda m: m.requests)),
    Metric(
        "onecard_requests_failed_total",
        "counter",
        "Requests not answered well, by reason; those turned away at once have reasons that begin with refused_.",
        _failures,
        ("reason",),
    ),
    Metric(
        "onecard_requests_in_flight",
        "gauge",
        "Requests that came in and are not answered yet, waiting ones included.",
        bare(lambda m: m.in_flight),
    ),
    Metric("onecard_queue_requests", "gauge", "Requests that wait for a batch.", bare(lambda m: m.queue_requests)),
    Metric("onecard_queue_bytes", "gauge", "Inputs of the requests that wait.", bare(lambda m: m.queue_bytes)),
    Metric(
        "onecard_queue_limit_requests", "gauge", "Most requests that may wait.", bare(lambda m: m.queue_limit_requests)
    ),
    Metric("onecard_queue_limit_bytes", "gauge", "Most bytes that may wait.", bare(lambda m: m.queue_limit_bytes)),
    Metric("onecard_rows_total", "counter", "Rows answered: a request of 8 rows counts as 8.", bare(lambda m: m.rows)),
    Metric(
        "onecard_padded_rows_total",
        "counter",
        "Rows run for nothing, to fill batches up to a bucket.",
        bare(lambda m: m.padded_rows),
    ),
    Metric("onecard_batches_total", "counter", "Batches run.", bare(lambda m: m.batches)),
    Metric("onecard_batch_rows", "histogram", "Rows of the batches, without padding.", bare(lambda m: m.batch_rows)),
    Metric(
        "onecard_request_duration_seconds",
        "histogram",
        "Requests, from coming in to being answered.",
        _histogram("request_s"),
    ),
    Metric(
        "onecard_queue_duration_seconds",
        "histogram",
        "Requests, waiting for a batch.",
        _histogram("queue_s"),
    ),
    Metric(
        "onecard_batch_duration_seconds",
        "histogram",
        "Batches, from being formed to their answers being the callers'.",
        _histogram("batch_s"),
    ),
    Metric(
        "onecard_copy_in_duration_seconds",
        "histogram",
        "Batches, collecting rows and copying them to the device.",
        _histogram("copy_in_s"),
    ),
    Metric("onecard_compute_duration_seconds", "histogram", "Batches, the model alone.", _histogram("compute_s")),
    Metric(
        "onecard_copy_out_duration_seconds", "histogram", "Batches, copying answers back.", _histogram("copy_out_s")
    ),
    Metric(
        "onecard_sentinel_checked_total",
        "counter",
        "Answers that the sentinel compared with the original's.",
        _sentinel(lambda s: s.checked),
    ),
    Metric(
        "onecard_sentinel_wrong_total",
        "counter",
        "Answers that the sentinel found wrong.",
        _sentinel(lambda s: s.wrong),
    ),
    Metric(
        "onecard_sentinel_difference_ratio",
        "histogram",
        "Relative difference between an answer and the original's.",
        _sentinel(lambda s: s.difference),
    ),
)
"""Of each model; labelled model and version as well."""

PROCESS_METRICS: tuple[Metric[ProcessFigures], ...] = (
    Metric(
        "onecard_process_start_time_seconds",
        "gauge",
        "When the process started, Unix time.",
        bare(lambda p: p.started_s),
    ),
    Metric(
        "onecard_process_cpu_seconds_total",
        "counter",
        "Processor time used, user and system together.",
        bare(lambda p: p.cpu_s),
    ),
    Metric("onecard_process_resident_memory_bytes", "gauge", "Main memory in use.", bare(lambda p: p.resident_bytes)),
    Metric("onecard_process_threads", "gauge", "Threads.", bare(lambda p: p.threads)),
    Metric("onecard_process_open_files", "gauge", "Open descriptors, sockets included.", bare(lambda p: p.open_files)),
)
"""Of each process of the server; labelled process as well."""

SUBJECT_LABELS: dict[str, Labels] = {
    "server": (),
    "model": ("model", "version"),
    "process": ("process",),
    "card": ("device",),
}
"""What tells the subjects of each table apart."""


def all_metrics() -> dict[str, tuple[Metric[Any], Labels]]:
    """Each metric with all of its labels, by name."""
    tables: dict[str, tuple[Metric[Any], ...]] = {
        "server": SERVER_METRICS,
        "model": MODEL_METRICS,
        "process": PROCESS_METRICS,
        "card": CARD_METRICS,
    }
    return {
        metric.name: (metric, (*SUBJECT_LABELS[subject], *metric.labels))
        for subject, metrics in tables.items()
        for metric in metrics
    }

"""The names under which Triton tells the same figures, for dashboards and scripts that were written for it.

Source: Triton Inference Server, "Metrics" in its user guide. Metrics of its response cache and pinned memory pool are
left out, because neither is here. Counters have no ``_total`` there; the formats know such metrics as untyped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from msgspec import UnsetType

from onecard.telemetry.metric import Kind, Labels, Metric, Reading
from onecard.telemetry.snapshot import ModelFigures, Sensors, Snapshot

_MODEL_LABELS = ("model", "version")
_GPU_LABELS = ("gpu_uuid",)
_REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
_BACKEND = ("engine_error", "out_of_memory")
_US = 1e6  # microseconds of a second


def _by_model(read: Callable[[ModelFigures], float | None]) -> Callable[[Snapshot], Reading]:
    def reading(snapshot: Snapshot) -> Reading:
        values = {(model.name, model.version): read(model) for model in snapshot.models}
        return {labels: value for labels, value in values.items() if value is not None}

    return reading


def _failures(snapshot: Snapshot) -> Reading:
    found: dict[Labels, float] = {}
    for model in snapshot.models:
        counts: Counter[str] = Counter()
        for reason, count in model.failures.items():
            counts[_triton_reason(reason)] += count
        found |= {(model.name, model.version, reason): counts[reason] for reason in _REASONS}
    return found


def _triton_reason(reason: str) -> str:
    if reason == "cancelled":
        return "CANCELED"
    if reason == "deadline" or reason.startswith("refused_"):
        return "REJECTED"
    return "BACKEND" if reason in _BACKEND else "OTHER"


def _sum_us(histogram: str) -> Callable[[ModelFigures], float | None]:
    def read(model: ModelFigures) -> float | None:
        distribution = model.histograms.get(histogram)
        return None if distribution is None else _US * distribution.sum

    return read


def _stage_us(stage: str) -> Callable[[ModelFigures], float | None]:
    return lambda model: _US * model.request_stages_s[stage] if stage in model.request_stages_s else None


def _gpu(key: str) -> Callable[[Snapshot], Reading]:
    def reading(snapshot: Snapshot) -> Reading:
        card = snapshot.card
        if card.get("kind") != "nvidia" or key not in card:
            return {}
        return {(str(card.get("uuid") or card.get("device") or card.get("name", "")),): card[key]}

    return reading


def _cpu(key: str) -> Callable[[Snapshot], Reading]:
    def reading(snapshot: Snapshot) -> Reading:
        sensors = _processor(snapshot)
        return {(): sensors[key]} if key in sensors else {}

    return reading


def _processor(snapshot: Snapshot) -> Sensors:
    if snapshot.card.get("kind") == "cpu":
        return snapshot.card
    return {} if isinstance(snapshot.host, UnsetType) else snapshot.host


def _metrics(kind: Kind, labels: Labels, *rows: tuple[str, str, Any]) -> tuple[Metric[Snapshot], ...]:
    return tuple(Metric(name, kind, text, read, labels) for name, text, read in rows)


TRITON_METRICS: tuple[Metric[Snapshot], ...] = (
    *_metrics(
        "untyped",
        _MODEL_LABELS,
        ("nv_inference_request_success", "Requests answered well.", _by_model(lambda m: m.requests)),
        ("nv_inference_count", "Rows answered.", _by_model(lambda m: m.rows)),
        ("nv_inference_exec_count", "Batches run.", _by_model(lambda m: m.batches)),
        ("nv_inference_request_duration_us", "Requests, cumulative time in all.", _by_model(_sum_us("request_s"))),
        ("nv_inference_queue_duration_us", "Requests, cumulative time waiting.", _by_model(_sum_us("queue_s"))),
        (
            "nv_inference_compute_input_duration_us",
            "Requests, cumulative time copying in.",
            _by_model(_stage_us("copy_in")),
        ),
        (
            "nv_inference_compute_infer_duration_us",
            "Requests, cumulative time in the model.",
            _by_model(_stage_us("compute")),
        ),
        (
            "nv_inference_compute_output_duration_us",
            "Requests, cumulative time copying out.",
            _by_model(_stage_us("copy_out")),
        ),
    ),
    Metric(
        "nv_inference_request_failure",
        "untyped",
        "Requests not answered well, by Triton's reasons.",
        _failures,
        (*_MODEL_LABELS, "reason"),
    ),
    *_metrics(
        "gauge",
        _MODEL_LABELS,
        ("nv_inference_pending_request_count", "Requests that wait.", _by_model(lambda m: m.queue_requests)),
    ),
    *_metrics(
        "gauge",
        _GPU_LABELS,
        ("nv_gpu_utilization", "Share of the time in which the card was busy, 0 to 1.", _gpu("utilisation")),
        ("nv_gpu_memory_total_bytes", "The card's memory.", _gpu("memory_total_bytes")),
        ("nv_gpu_memory_used_bytes", "Of it in use.", _gpu("memory_used_bytes")),
        ("nv_gpu_power_usage", "Watts drawn now.", _gpu("power_w")),
        ("nv_gpu_power_limit", "Most watts that may be drawn.", _gpu("power_limit_w")),
    ),
    Metric("nv_energy_consumption", "untyped", "Joules, from an arbitrary beginning.", _gpu("energy_j"), _GPU_LABELS),
    *_metrics(
        "gauge",
        (),
        ("nv_cpu_utilization", "Of all cores, 0 to 1.", _cpu("utilisation")),
        ("nv_cpu_memory_total_bytes", "Main memory.", _cpu("memory_total_bytes")),
        ("nv_cpu_memory_used_bytes", "Of it in use.", _cpu("memory_used_bytes")),
    ),
)
"""Each reads the whole snapshot."""

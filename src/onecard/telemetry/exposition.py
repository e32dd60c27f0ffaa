"""A snapshot as a page that Prometheus reads, in its text format or, when asked for, in OpenMetrics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, cast

from onecard.errors import MissingDependencyError
from onecard.telemetry.catalogue import MODEL_METRICS, PROCESS_METRICS, SERVER_METRICS, SUBJECT_LABELS
from onecard.telemetry.catalogue_card import CARD_METRICS
from onecard.telemetry.histogram import Distribution
from onecard.telemetry.metric import Labels, Metric
from onecard.telemetry.snapshot import Sensors, Snapshot
from onecard.telemetry.triton_names import TRITON_METRICS

if TYPE_CHECKING:
    from prometheus_client.core import Metric as Family
    from prometheus_client.registry import Collector

Compatibility: TypeAlias = Literal["", "triton"]


class Page(NamedTuple):
    """The body of ``GET /metrics``, and its ``Content-Type``."""

    body: bytes
    content_type: str


def expose(snapshot: Snapshot, accept: str = "", compatibility: Compatibility = "") -> Page:
    """Write all metrics of a snapshot. It takes about 3 ms for each model, so it is better called off the event loop.

    Args:
        snapshot: of the whole server.
        accept: the request's ``Accept`` header.
        compatibility: ``triton`` adds the names that Triton's dashboards and scripts look for.

    Raises:
        MissingDependencyError: prometheus-client is not installed.
    """
    try:
        from prometheus_client.exposition import choose_encoder
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"metrics need {error.name}.", "pip install 'onecard[serve]'") from error
    try:
        encode, content_type = choose_encoder(accept)
    except Exception:  # it reads versions that clients made up
        encode, content_type = choose_encoder("")
    return Page(encode(cast("Collector", _Families(snapshot, compatibility))), content_type)


class _Families:
    """What prometheus-client's encoders ask of a collector."""

    def __init__(self, snapshot: Snapshot, compatibility: Compatibility) -> None:
        self._snapshot = snapshot
        self._compatibility = compatibility

    def collect(self) -> Iterator[Family]:
        snapshot = self._snapshot
        yield from _families(SERVER_METRICS, SUBJECT_LABELS["server"], [((), snapshot)])
        models = [((model.name, model.version), model) for model in snapshot.models]
        yield from _families(MODEL_METRICS, SUBJECT_LABELS["model"], models)
        processes = [((process.role,), process) for process in snapshot.processes]
        yield from _families(PROCESS_METRICS, SUBJECT_LABELS["process"], processes)
        yield from _families(CARD_METRICS, SUBJECT_LABELS["card"], _cards(snapshot))
        if self._compatibility == "triton":
            yield from _families(TRITON_METRICS, (), [((), snapshot)])


def _cards(snapshot: Snapshot) -> list[tuple[Labels, Sensors]]:
    """The card and the host's processor, by device."""
    return [((device_of(sensors),), sensors) for sensors in (snapshot.card, snapshot.host) if sensors]


def device_of(sensors: Sensors) -> str:
    """Which device a sample was taken of; its kind, where it does not say."""
    return str(sensors.get("device") or sensors.get("kind") or "unknown")


def _families(
    metrics: Iterable[Metric[Any]], subject_labels: Labels, subjects: Sequence[tuple[Labels, Any]]
) -> Iterator[Family]:
    """The families of a table that any subject has something of, as the format allows no empty ones."""
    for metric in metrics:
        family = _family(metric, (*subject_labels, *metric.labels))
        for own, subject in subjects:
            for values, reading in metric.read(subject).items():
                if isinstance(reading, Distribution):
                    if reading.bounds:
                        family.add_metric((*own, *values), *_buckets(reading))
                else:
                    family.add_metric((*own, *values), reading)
        if family.samples:
            yield family


def _family(metric: Metric[Any], labels: Labels) -> Any:
    from prometheus_client import core

    kinds = {
        "gauge": core.GaugeMetricFamily,
        "counter": core.CounterMetricFamily,
        "histogram": core.HistogramMetricFamily,
        "untyped": core.UntypedMetricFamily,
    }
    return kinds[metric.kind](metric.name, metric.help, labels=labels, unit=metric.unit)


def _buckets(distribution: Distribution) -> tuple[list[tuple[str, float]], float]:
    """Cumulative counts by upper bound, and the sum."""
    bounds = [*(str(bound) for bound in distribution.bounds), "+Inf"]
    return list(zip(bounds, map(float, accumulate(distribution.counts)), strict=True)), distribution.sum

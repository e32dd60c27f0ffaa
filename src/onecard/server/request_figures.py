"""What became of the requests that this front took, by model and version, for metrics and the console."""

from __future__ import annotations

from collections import Counter

from onecard.errors import (
    DeadlineError,
    DeviceMemoryError,
    EngineClosedError,
    NoVariantError,
    OnecardError,
    QueueFullError,
)
from onecard.server.http_types import HttpError
from onecard.telemetry.histogram import Histogram

_VERSIONS = 2  # of a model that are remembered: the one that serves, and the one that it replaced
_BY_STATUS = {429: "refused_queue_full", 503: "refused_not_ready", 504: "deadline", 507: "out_of_memory"}
_CLIENT_ERRORS = range(400, 500)


class RequestFigures:
    """One version's requests. Told from the event loop alone; a request is counted when it is over.

    Attributes:
        admitted: requests handed on to the engine.
        open: those of them that are not over.
        failures: requests without an answer, by reason (:data:`onecard.telemetry.snapshot.FAILURE_REASONS`).
        seconds: from coming in to the answer, of those answered well.
    """

    __slots__ = ("admitted", "failures", "open", "seconds")

    def __init__(self) -> None:
        self.admitted = 0
        self.open = 0
        self.failures: Counter[str] = Counter()
        self.seconds = Histogram()

    def began(self) -> None:
        """A request was handed on."""
        self.admitted += 1
        self.open += 1

    def answered(self, seconds: float) -> None:
        """One that was handed on has its answer."""
        self.open -= 1
        self.seconds.observe(seconds)

    def failed(self, reason: str) -> None:
        """One that was handed on has none, and will not."""
        self.open -= 1
        self.failures[reason] += 1


class RequestBook:
    """The figures of all models."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, RequestFigures]] = {}

    def of(self, model: str, version: str) -> RequestFigures:
        """Of one version; only of names that the server has, or a client could fill the memory."""
        versions = self._found.get(model)
        if versions is None:
            versions = self._found[model] = {}
        found = versions.get(version)
        if found is None:
            found = versions[version] = RequestFigures()
            while len(versions) > _VERSIONS:
                del versions[next(iter(versions))]
        return found

    def versions(self, model: str) -> dict[str, RequestFigures]:
        """All that are remembered of a model, the oldest first."""
        return self._found.get(model, {})


def reason_of(error: BaseException, in_time: bool = True) -> str:
    """Why a request has no answer, in the words of :data:`onecard.telemetry.snapshot.FAILURE_REASONS`.

    Args:
        error: that it ended with.
        in_time: whether its deadline had not passed: it was refused because it would.
    """
    if isinstance(error, QueueFullError):
        return "refused_queue_full"
    if isinstance(error, DeadlineError):
        return "refused_deadline" if in_time else "deadline"
    if isinstance(error, EngineClosedError | NoVariantError):
        return "refused_not_ready"
    if isinstance(error, DeviceMemoryError):
        return "out_of_memory"
    status = error.status if isinstance(error, HttpError) else getattr(error, "http_status", 500)
    found = _BY_STATUS.get(status) if isinstance(error, OnecardError) else None
    return found or ("bad_input" if status in _CLIENT_ERRORS else "engine_error")

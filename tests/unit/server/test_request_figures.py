"""How requests are counted by what became of them."""

import pytest

from onecard.errors import (
    DeadlineError,
    DeviceMemoryError,
    EngineClosedError,
    EngineError,
    QueueFullError,
    SpecError,
)
from onecard.server.http_types import HttpError
from onecard.server.request_figures import RequestBook, RequestFigures, reason_of
from onecard.telemetry.snapshot import FAILURE_REASONS


@pytest.mark.parametrize(
    ("error", "in_time", "reason"),
    [
        (QueueFullError("full", "", 1.0), True, "refused_queue_full"),
        (HttpError(429, "full"), True, "refused_queue_full"),
        (DeadlineError("would be late"), True, "refused_deadline"),
        (DeadlineError("is late"), False, "deadline"),
        (EngineClosedError("closing"), True, "refused_not_ready"),
        (HttpError(503, "not ready"), True, "refused_not_ready"),
        (DeviceMemoryError("too large"), True, "out_of_memory"),
        (SpecError("no such input"), True, "bad_input"),
        (HttpError(400, "no JSON"), True, "bad_input"),
        (HttpError(413, "too large"), True, "bad_input"),
        (EngineError("the model failed"), True, "engine_error"),
        (RuntimeError("a fault of our own"), True, "engine_error"),
    ],
)
def test_every_error_has_a_reason_that_the_metrics_know(error, in_time, reason):
    assert reason_of(error, in_time) == reason
    assert reason in FAILURE_REASONS


def test_what_is_under_way_is_what_began_and_is_not_over():
    figures = RequestFigures()
    for _ in range(3):
        figures.began()
    figures.answered(0.01)
    figures.failed("deadline")
    assert (figures.admitted, figures.open, dict(figures.failures)) == (3, 1, {"deadline": 1})
    assert (figures.seconds.copy().count, figures.seconds.copy().sum) == (1, 0.01)


def test_of_each_model_two_versions_are_remembered():
    book = RequestBook()
    first = book.of("m", "1")
    assert book.of("m", "1") is first
    book.of("m", "2")
    assert list(book.versions("m")) == ["1", "2"]
    book.of("m", "3")
    assert list(book.versions("m")) == ["2", "3"]
    assert book.versions("nobody") == {}

"""Objectives, addresses, schedules and traces: what is read, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from onecard.arrivals import poisson_times
from onecard.bench.load import Load, check_load, due_times, read_arrivals
from onecard.bench.slo import Slo, parse_slo
from onecard.bench.target import parse_address
from onecard.errors import DataError, UsageError


@pytest.mark.parametrize(
    ("text", "slo", "shown"),
    [
        ("p99=20ms", Slo(99.0, 0.02), "p99=20ms"),
        (" p99.9 <= 1s", Slo(99.9, 1.0), "p99.9=1000ms"),
        ("max=2s", Slo(100.0, 2.0), "max=2000ms"),
        ("p50<500us", Slo(50.0, 0.0005), "p50=0.5ms"),
    ],
)
def test_an_objective_is_read(text, slo, shown):
    assert parse_slo(text) == slo
    assert str(slo) == shown and parse_slo(shown) == slo


@pytest.mark.parametrize("text", ["", "p99", "99=20ms", "p101=1s", "p0=1s", "p99=", "p99=fast", "p99=-1s"])
def test_a_bad_objective_is_refused(text):
    with pytest.raises(UsageError):
        parse_slo(text)


def test_how_many_may_be_late():
    assert [Slo(99.0, 1).allowed_late(n) for n in (10, 99, 100, 1000)] == [0, 0, 1, 10]
    assert Slo(100.0, 1).allowed_late(1000) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://h:8000/m", ("http", "h", 8000, "m", False)),
        ("http://h:8000/v2/models/a%20b/infer", ("http", "h", 8000, "a b", False)),
        ("https://[::1]/m/", ("http", "::1", 443, "m", True)),
        ("http://h:1", ("http", "h", 1, "", False)),
        ("grpc://h:8001", ("grpc", "h", 8001, "", False)),
    ],
)
def test_an_address_is_read(text, expected):
    found = parse_address(text)
    assert (found.kind, found.host, found.port, found.model, found.tls) == expected


def test_sockets_and_folders(tmp_path):
    assert parse_address("unix:/run/x.sock", "m").socket == "/run/x.sock"
    assert parse_address(str(tmp_path)).kind == "bundle"
    assert parse_address("http://h:1", "m").model == "m"


@pytest.mark.parametrize("text", ["ftp://h/m", "http://", "http://h:1/a/b/c", "grpc://h", "http://h:x/m", "/none/such"])
def test_a_bad_address_is_refused(text):
    with pytest.raises(UsageError):
        parse_address(text)


def test_two_names_are_refused():
    with pytest.raises(UsageError, match="Name one"):
        parse_address("http://h:1/a", "b")


def test_random_times_fill_the_duration():
    due = due_times(Load("server", 50.0, qps=100.0))
    assert len(due) == pytest.approx(5000, abs=300)
    assert due == sorted(due) and 49 < due[-1] < 50
    assert due == due_times(Load("server", 50.0, qps=100.0)) != due_times(Load("server", 50.0, qps=100.0, seed=1))
    assert np.diff([0, *due]).std() == pytest.approx(0.01, rel=0.1), "exponential gaps"
    assert len(due_times(Load("server", 1.0, qps=100.0, requests=250))) == 250
    assert due[:10] == poisson_times(100.0, 10)


def test_other_schedules():
    assert due_times(Load("offline", 5.0, requests=3)) == [0.0, 0.0, 0.0]
    assert due_times(Load("server", 1.0, arrivals=(0.0, 0.5, 2.0))) == [0.0, 0.5]
    assert due_times(Load("server", 9.0, arrivals=(0.0, 0.5, 2.0), requests=1)) == [0.0]


@pytest.mark.parametrize(
    "load",
    [Load("server", 1.0), Load("server", 1.0, qps=-1), Load("server", 1.0, qps=float("nan")),
     Load("multi-stream", 1.0, samples=0), Load("closed-loop", 1.0, concurrency=0), Load("offline", 1.0, requests=-1),
     Load("server", 1e6, qps=1e6), Load("offline", 1.0, most_in_flight=0)],
)  # fmt: skip
def test_a_load_that_cannot_be_made_is_refused(load):
    with pytest.raises(UsageError):
        check_load(load)


def test_a_trace_is_read(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("# seconds\n10.5\n\n10.0\n11.0\n")
    assert read_arrivals(text) == (0.0, 0.5, 1.0)
    assert read_arrivals(text, qps=4.0) == (0.0, 0.25, 0.5), "three arrivals, two gaps"
    np.save(tmp_path / "a.npy", np.array([3.0, 4.0]))
    assert read_arrivals(tmp_path / "a.npy") == (0.0, 1.0)


@pytest.mark.parametrize("content", [None, "", "# none\n", "soon\n", "1\nnan\n"])
def test_a_bad_trace_is_refused(tmp_path, content):
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError):
        read_arrivals(path)

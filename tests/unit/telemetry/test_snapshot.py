"""The state as JSON, and the parts of several processes as one."""

from __future__ import annotations

import json

import msgspec
import pytest

from onecard.errors import DataError
from onecard.telemetry.histogram import ROWS, Histogram
from onecard.telemetry.snapshot import (
    FAILURE_REASONS,
    ModelFigures,
    ProcessFigures,
    SentinelFigures,
    ServerFigures,
    Snapshot,
    decode,
    encode,
    merge,
)
from tests.services.synthetic_snapshots import durations, snapshot


def test_it_is_read_as_it_was_written():
    sent = snapshot(3)
    assert encode(decode(encode(sent))) == encode(sent)
    assert decode(encode(sent)).models == sent.models


def test_what_is_not_known_is_left_out_and_what_is_zero_is_there():
    state = json.loads(encode(Snapshot(time_s=1.0, models=(ModelFigures(name="a", version="1"),))))
    assert "host" not in state
    (model,) = state["models"]
    assert model["requests"] == model["queue_requests"] == model["padded_rows"] == 0
    assert not {"sentinel", "variants", "load_s", "p99_target_s", "queue_limit_bytes"} & set(model)
    assert None not in model.values()


def test_the_names_that_readers_of_the_json_look_for_are_there():
    state = json.loads(encode(snapshot(3)))
    assert {"time_s", "server", "models", "card"} <= set(state)
    wanted = "version started_s ready live fronts engine_restarts open_connections platform"
    assert set(wanted.split()) <= set(state["server"])
    wanted = (
        "name version variant state reason device inputs outputs queue_requests queue_bytes in_flight requests "
        "failures rows padded_rows batches histograms batch_rows load_s memory_bytes sentinel"
    )
    assert set(wanted.split()) <= set(state["models"][0])
    wanted = "request_s queue_s copy_in_s compute_s copy_out_s"
    assert set(wanted.split()) <= set(state["models"][0]["histograms"])
    assert state["card"]["kind"] == "nvidia"
    assert "frequency_hz" not in state["card"]


def test_a_newer_server_is_understood_and_anything_else_is_not():
    state = json.loads(encode(snapshot(3)))
    state["server"]["something_new"] = 1
    assert encode(decode(json.dumps(state).encode())) == encode(snapshot(3))
    for wrong in (b"", b"[]", b"<html>", b'{"time_s": "now"}'):
        with pytest.raises(DataError, match="not the state of an onecard server"):
            decode(wrong)


def test_reasons_are_told_apart():
    assert len(set(FAILURE_REASONS)) == len(FAILURE_REASONS)


def front(requests: int, connections: int, started_s: float = 10.0) -> Snapshot:
    model = ModelFigures(
        name="a",
        version="1",
        in_flight=2,
        admitted=requests + 2,
        requests=requests,
        failures={"bad_input": 1, f"refused_{connections}": 2},
        histograms={"request_s": durations(requests, 0.01)},
    )
    server = ServerFigures(
        version="0.1.0", started_s=started_s, fronts=2, engine_restarts=3, open_connections=connections
    )
    process = ProcessFigures("front", 1.0, 2.0, 3, 4, 5)
    return Snapshot(time_s=100.0 + requests, server=server, models=(model,), processes=(process,))


def engine() -> Snapshot:
    sizes = Histogram(ROWS)
    sizes.observe(4)
    first = ModelFigures(
        name="a",
        version="1",
        variant="eager",
        device="cpu",
        state="LOADING",
        queue_requests=5,
        queue_limit_requests=100,
        rows=40,
        batches=10,
        batch_rows=sizes.copy(),
        histograms={"queue_s": durations(40, 0.001)},
        sentinel=SentinelFigures(4, 1),
    )
    second = ModelFigures(name="b", version="2", rows=7)
    return Snapshot(time_s=99.0, models=(first, second), card={"kind": "cpu"})


def test_parts_become_one():
    merged = merge([front(30, 5), front(12, 6, started_s=8.0), engine()])
    assert merged.time_s == 130.0
    assert merged.card == {"kind": "cpu"}
    assert len(merged.processes) == 2
    assert merged.server == ServerFigures(
        version="0.1.0", started_s=8.0, fronts=2, engine_restarts=3, open_connections=11
    )
    first, second = merged.models
    assert (second.name, second.rows) == ("b", 7)
    assert (first.requests, first.admitted, first.in_flight) == (42, 46, 4)
    assert first.failures == {"bad_input": 2, "refused_5": 2, "refused_6": 2}
    assert first.histograms["request_s"] == durations(30, 0.01).plus(durations(12, 0.01))
    assert first.histograms["queue_s"] == durations(40, 0.001)
    assert (first.variant, first.device, first.state) == ("eager", "cpu", "LOADING")
    assert (first.queue_requests, first.queue_limit_requests, first.rows, first.batches) == (5, 100, 40, 10)
    assert first.batch_rows.count == 1
    assert first.sentinel == SentinelFigures(4, 1)
    assert first.load_s is msgspec.UNSET


def test_all_must_be_ready():
    ready = front(1, 1)
    ending = msgspec.structs.replace(ready, server=ServerFigures(ready=False))
    assert merge([ready]).server.ready
    assert not merge([ready, ending]).server.ready


def test_a_failure_that_is_still_zero_stays_after_merging():
    part = Snapshot(time_s=1.0, models=(ModelFigures(name="a", version="1", failures={"deadline": 0}),))
    assert merge([part, part]).models[0].failures == {"deadline": 0}


def test_nothing_cannot_be_merged():
    with pytest.raises(DataError, match="no snapshots"):
        merge([])

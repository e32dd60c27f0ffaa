"""Load on a server of known behaviour: stalls are seen, refusals counted, silence is not good, the knee is found.

The machine may stall as well. So latencies are bounded from below, and rates from above; other bounds have much room.
"""

from __future__ import annotations

import math
import signal
import threading
import time

import numpy as np
import pytest

from onecard.bench.histogram import Histogram
from onecard.bench.load import Load
from onecard.bench.session import BenchOptions, run_bench
from onecard.bench.slo import parse_slo
from onecard.bench.target import parse_address
from onecard.errors import EngineError, UsageError
from tests.unit.bench.bench_server import Behaviour, known_server

pytestmark = pytest.mark.timeout(300)


def bench(url: str, load: Load, slo: str = "", **options):
    options.setdefault("warm_up_s", 0.0)
    options.setdefault("slo", parse_slo(slo) if slo else None)
    return run_bench(BenchOptions(parse_address(url), load, **options))


def test_a_stall_is_charged_to_all_who_would_have_come():
    stalling = Behaviour(stall_at_s=1.0, stall_s=1.0)
    with known_server(stalling) as (url, _):
        opened = bench(f"{url}/m", Load("server", 3.0, qps=150)).run
    with known_server(stalling) as (url, _):
        closed = bench(f"{url}/m", Load("closed-loop", 3.0)).run
    assert opened.answered == opened.queries == pytest.approx(450, abs=90)
    assert opened.percentiles_ms["p99.9"] > 900, "those who came first"
    assert 400 < opened.percentiles_ms["p90"] < 5000, "a third came during the stall"
    assert closed.percentiles_ms["max"] > 900, "the one that was under way"
    assert closed.percentiles_ms["p99"] < 400, "and it alone: the caller waited, and asked nothing more"
    assert max(second.p99_ms for second in opened.seconds[1:] if not math.isnan(second.p99_ms)) > 900
    assert not closed.open_loop and opened.open_loop


def test_refusals_are_counted_apart():
    with known_server(Behaviour(service_s=0.02, most_waiting=2)) as (url, known):
        run = bench(f"{url}/m", Load("server", 2.0, qps=150), "p99=30s").run
    assert run.refused == {"HTTP 429": known.refused} and run.answered == known.answered
    assert run.answered + run.refused["HTTP 429"] == run.queries
    assert 5 < run.answered_per_s < 55, "as fast as it serves"
    assert run.goodput_per_s == pytest.approx(run.answered_per_s)
    assert Histogram.decode(run.histogram).total == run.answered, "a refusal is no latency"
    assert "not answered" in run.shortfall
    assert sum(second.failed for second in run.seconds) == run.refused["HTTP 429"]


def test_silence_counts_as_waiting():
    with known_server(Behaviour(hang=True)) as (url, _):
        run = bench(f"{url}/m", Load("server", 0.5, qps=40, drain_s=0.5), "p99=100ms").run
    assert run.answered == 0 and run.unanswered == run.queries > 5
    assert run.percentiles_ms["p50"] > 500
    assert run.objective_kept is False and "100.00% not answered" in run.shortfall
    assert "had no answer" in run.notes[0]


def test_requests_beyond_the_connections_wait_at_the_targets_expense():
    with known_server(Behaviour(service_s=0.01)) as (url, _):
        run = bench(f"{url}/m", Load("server", 1.0, qps=300, most_in_flight=4)).run
    assert run.answered == run.queries > 200
    assert run.sender.waited > 100 and run.sender.peak > 50
    assert run.percentiles_ms["max"] > 1000, "3 s of work came in 1 s"
    assert run.backlog_grows
    assert "waited for one of 4 connections" in " ".join(run.notes)


def test_the_streams_of_mlperf():
    with known_server(Behaviour(service_s=0.01)) as (url, _):
        single = bench(f"{url}/m", Load("single-stream", 1.0)).run
        multi = bench(f"{url}/m", Load("multi-stream", 1.0, samples=5), rows=3).run
        offline = bench(f"{url}/m", Load("offline", 1.0, requests=60, most_in_flight=20)).run
        closed = bench(f"{url}/m", Load("closed-loop", 60.0, requests=30, concurrency=4)).run
    assert single.percentiles_ms["p50"] >= 10 and single.answered <= 100
    assert multi.percentiles_ms["p50"] >= 50, "five one after another by one worker"
    assert multi.rows_per_s == pytest.approx(15 * multi.answered_per_s)
    assert offline.queries == offline.answered == 60
    assert 10 < offline.answered_per_s <= 101
    assert closed.queries == 30, "no more than were asked for"


def test_a_trace_is_followed():
    times = (0.0, 0.1, 0.1, 0.5)
    with known_server() as (url, known):
        run = bench(f"{url}/m", Load("server", 1.0, arrivals=times)).run
    assert run.queries == 4 and run.answered == 4
    assert run.seconds[0].sent == sum(second.sent for second in run.seconds) == 4
    assert len(known.bodies) == 4


def test_the_offline_count_comes_from_the_warm_up():
    begun = time.monotonic()
    with known_server(Behaviour(service_s=0.005)) as (url, known):
        found = bench(f"{url}/m", Load("offline", 1.0, most_in_flight=8), warm_up_s=0.5)
    took_s = time.monotonic() - begun
    assert found.run.queries == found.run.answered == found.settings.requests
    warm_up = known.answered - found.run.answered  # about 100 in half a second, if the machine does not stall
    assert max(8, int(warm_up / took_s)) <= found.settings.requests <= max(8, 2.2 * warm_up)
    assert found.settings.requests < 280, "200 a second"


def test_the_knee_of_a_known_server_is_found():
    with known_server(Behaviour(service_s=0.004)) as (url, _):
        found = bench(f"{url}/m", Load("server", 2.5, qps=125), "p90=80ms", find_knee=True, tolerance=0.04)
    knee = found.knee
    assert knee.complete
    # M/D/1 at 250 a second: 90 % within 20 services up to 95 % of them; a machine that stalls has its knee below that.
    assert 24 < knee.qps < 262
    assert knee.above_qps <= knee.qps * 1.04
    assert found.run.objective_kept and found.run.offered_qps == knee.qps


def test_answers_in_chunks_and_what_is_sent():
    with known_server(Behaviour(chunked=True)) as (url, known):
        found = bench(url, Load("single-stream", 60.0, requests=9), rows=2)
    assert found.run.answered == 9
    assert found.target["server"] == "known 7" and found.target["model"] == "m"
    length = known.bodies[0].index(b"}]}") + 3
    assert b'"shape":[2,4]' in known.bodies[0][:length]
    values = np.frombuffer(known.bodies[0][length:], "<f4")
    assert len(values) == 8 and 0.2 < values.std() < 3
    assert len(set(known.bodies)) > 1, "not the same input again and again"


def test_ctrl_c_keeps_what_was_measured():
    with known_server() as (url, known):

        def interrupt() -> None:
            while len(known.bodies) < 30:
                time.sleep(0.01)
            signal.raise_signal(signal.SIGINT)

        threading.Thread(target=interrupt, daemon=True).start()
        begun = time.monotonic()
        # Of those that came no more than four can be without an answer, however late the answers are looked at.
        found = bench(f"{url}/m", Load("server", 60.0, qps=50, most_in_flight=4))
    assert time.monotonic() - begun < 30
    assert found.interrupted and found.run.interrupted
    assert 5 < found.run.answered < 2000
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(("path", "message"), [("/none", "does not serve 'none': HTTP 404 no such model It has: m.")])
def test_an_unknown_model(path, message):
    with known_server() as (url, _), pytest.raises(UsageError) as error:
        bench(url + path, Load("single-stream", 1.0))
    assert message in str(error.value)


def test_a_server_that_is_not_there():
    with known_server() as (url, _):
        pass
    with pytest.raises(EngineError, match="cannot be reached"):
        bench(f"{url}/m", Load("single-stream", 1.0))


def test_a_server_that_refuses_all():
    refusing = Behaviour(most_waiting=0)
    with known_server(refusing) as (url, _), pytest.raises(EngineError, match="too much is waiting"):
        bench(f"{url}/m", Load("server", 1.0, qps=10), warm_up_s=0.2)

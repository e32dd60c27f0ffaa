"""One run of MLPerf's LoadGen in this process: its settings, the figures it must be told beforehand, and the test.

LoadGen cannot be interrupted and writes its files from C++, so this belongs into a process of its own
(:mod:`onecard.bench.mlperf_worker`).
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from onecard.bench.mlperf_accuracy import read_answers
from onecard.bench.mlperf_job import (
    CRASH_LOG,
    LOG_PREFIX,
    RESULT,
    STREAMS,
    Finished,
    MlperfJob,
    MlperfProgress,
    MlperfSettings,
)
from onecard.bench.mlperf_system import Bytes, SystemUnderTest
from onecard.environment import detect
from onecard.errors import DataError, MissingDependencyError
from onecard.runtime.engine import Engine, EngineOptions
from onecard.runtime.tune import tuned_options
from onecard.verify.data import Dataset, load_data
from onecard.verify.evaluate import evaluate
from onecard.verify.metrics import get_metric

Report = Callable[[MlperfProgress], None]
Fail = Callable[[BaseException], None]

_PROBE_S = 1.0
_PROBE_QUERIES = 5
_SHORTER = 0.5  # than the quickest query that was seen: LoadGen must not run out of queries
_FASTER = 1.2  # than the rate that was seen, likewise
_REPORT_S = 0.5
_UNBOUNDED = 1 << 40


def run(job: MlperfJob, report: Report, fail: Fail) -> Finished:
    """Open the bundle, run LoadGen's test on it, and compute the metric in the accuracy mode.

    Args:
        job: see :class:`MlperfJob`; its folder is there.
        report: told how far it is, from any thread.
        fail: told when a request failed. LoadGen then waits for ever: this process must be ended.

    Raises:
        OnecardError: see :func:`onecard.bench.mlperf.run_mlperf`.
    """
    loadgen = import_loadgen()
    report(MlperfProgress("opening the bundle"))
    accuracy = job.settings.mode == "accuracy"
    if accuracy:
        get_metric(job.metric)  # before the work, not after it
    with Engine.open(job.bundle, job.device, _options(job)) as engine:
        report(MlperfProgress("reading the data"))
        rows = load_data(job.data, engine.spec)
        if accuracy and rows.labels is None:
            raise DataError("the accuracy mode needs labels.", "Put them beside the inputs as 'label'.")
        settings = job.settings
        if not accuracy:
            settings = with_expectations(settings, engine, rows, report, fail)
        system = _test(loadgen, job, settings, engine, rows, report, fail)
        environment = detect(engine.device)
    score = None
    if accuracy:
        score = evaluate(read_answers(job.output, system.fields, rows.rows), rows, job.metric)
    return Finished(rows.rows, score, environment)


def import_loadgen() -> Any:
    """MLPerf's package.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import mlperf_loadgen
    except ImportError as error:
        raise MissingDependencyError(
            f"MLPerf's LoadGen cannot be imported: {error}.", "Install it with: pip install 'onecard[mlperf]'"
        ) from error
    return mlperf_loadgen


def with_expectations(
    settings: MlperfSettings, engine: Engine, rows: Dataset, report: Report, fail: Fail
) -> MlperfSettings:
    """Settings with the latency or rate from which LoadGen makes its queries, measured where none was given."""
    if settings.scenario == "Offline" and settings.qps is None:
        report(MlperfProgress("measuring the rate to expect"))
        return dataclasses.replace(settings, qps=_FASTER * _rate(engine, rows, fail))
    if settings.scenario in STREAMS and settings.latency_s is None:
        report(MlperfProgress("measuring the latency to expect"))
        samples = settings.samples_per_query if settings.scenario == "MultiStream" else 1
        return dataclasses.replace(settings, latency_s=_SHORTER * _quickest(engine, rows, samples, fail))
    return settings


def loadgen_settings(loadgen: Any, settings: MlperfSettings) -> Any:
    """LoadGen's own settings; what is not ours to say stays as it has it."""
    ours, scenario = settings, settings.scenario
    theirs = loadgen.TestSettings()
    theirs.scenario = getattr(loadgen.TestScenario, scenario)
    theirs.mode = loadgen.TestMode.AccuracyOnly if ours.mode == "accuracy" else loadgen.TestMode.PerformanceOnly
    theirs.min_duration_ms = math.ceil(1e3 * ours.min_duration_s)
    theirs.min_query_count = ours.min_queries
    theirs.multi_stream_samples_per_query = ours.samples_per_query
    prefix = {"SingleStream": "single_stream", "MultiStream": "multi_stream", "Server": "server"}.get(scenario)
    if prefix and ours.percentile is not None:
        setattr(theirs, f"{prefix}_target_latency_percentile", ours.percentile)
    if prefix and ours.latency_s is not None:
        role = "target" if scenario == "Server" else "expected"
        setattr(theirs, f"{prefix}_{role}_latency_ns", max(1, round(1e9 * ours.latency_s)))
    if ours.qps is not None:
        setattr(theirs, "server_target_qps" if scenario == "Server" else "offline_expected_qps", ours.qps)
    return theirs


def _options(job: MlperfJob) -> EngineOptions:
    """The bundle's tuned options with a queue without bounds: MLPerf knows no refusals, only late answers."""
    options = tuned_options(job.bundle, device=job.device)
    policy = dataclasses.replace(options.policy, queue_items=_UNBOUNDED, queue_bytes=_UNBOUNDED)
    return dataclasses.replace(options, policy=policy, timings=False)


def _test(  # noqa: PLR0913, PLR0917 - the parts that a test joins
    loadgen: Any,
    job: MlperfJob,
    settings: MlperfSettings,
    engine: Engine,
    rows: Dataset,
    report: Report,
    fail: Fail,
) -> SystemUnderTest:
    """Let LoadGen run its test, and return when its files are written."""

    def complete(ids: Sequence[int], answers: Bytes) -> None:
        address, size = answers.ctypes.data, answers.shape[1]  # LoadGen copies what it keeps before it returns
        responses = [loadgen.QuerySampleResponse(number, address + i * size, size) for i, number in enumerate(ids)]
        loadgen.QuerySamplesComplete(responses)

    system = SystemUnderTest(engine, rows, complete, fail, settings.scenario == "Offline")
    under_test = loadgen.ConstructFastSUT(system.issue, _ignore)
    library = loadgen.ConstructQSL(rows.rows, rows.rows, _ignore, _ignore)  # all samples are in memory already
    over = threading.Event()
    reporter = threading.Thread(target=_report, args=(system, settings, over, report), daemon=True)
    reporter.start()
    try:
        clear(job.output)
        audit = str(job.output / "audit.config")  # LoadGen's own default is whatever lies in the working directory
        loadgen.StartTestWithLogSettings(
            under_test, library, loadgen_settings(loadgen, settings), _log_settings(loadgen, job.output), audit
        )
        system.close()
    finally:
        over.set()
        reporter.join()
        loadgen.DestroyQSL(library)
        loadgen.DestroyFastSUT(under_test)
    return system


def clear(folder: Path) -> None:
    """Remove an earlier run's files, so that none of them is taken for this one's."""
    for path in (*folder.glob(f"{LOG_PREFIX}*"), folder / RESULT, folder / CRASH_LOG):
        path.unlink(missing_ok=True)


def _log_settings(loadgen: Any, folder: Path) -> Any:
    output = loadgen.LogOutputSettings()
    output.outdir = str(folder)
    output.prefix = LOG_PREFIX
    output.copy_summary_to_stdout = False
    settings = loadgen.LogSettings()
    settings.log_output = output
    settings.enable_trace = False
    return settings


def _ignore(*_: object) -> None:
    """LoadGen tells when it sent the last query and which samples to load; there is nothing to do."""


def _report(system: SystemUnderTest, settings: MlperfSettings, over: threading.Event, report: Report) -> None:
    stage = f"{settings.scenario}, {settings.mode}"
    while not over.wait(_REPORT_S):
        report(MlperfProgress(stage, system.issued, system.answered))


class _Probe:
    """Takes answers in LoadGen's place."""

    def __init__(self, engine: Engine, rows: Dataset, fail: Fail, in_bulk: bool) -> None:
        self._rows = rows.rows
        self._changed = threading.Condition()
        self._answered = 0
        self._failed = False
        self._fail = fail
        self._system = SystemUnderTest(engine, rows, self._complete, self._stop, in_bulk)

    def ask(self, samples: int) -> float:
        """Seconds from a query of so many samples to its last answer."""
        with self._changed:
            self._answered = 0
        began = time.perf_counter()
        self._system.issue(range(samples), [number % self._rows for number in range(samples)])
        with self._changed:
            self._changed.wait_for(lambda: self._answered == samples or self._failed)
        return time.perf_counter() - began

    @property
    def failed(self) -> bool:
        return self._failed

    def close(self) -> None:
        self._system.close()

    def _complete(self, ids: Sequence[int], answers: Bytes) -> None:
        with self._changed:
            self._answered += len(ids)
            self._changed.notify()

    def _stop(self, error: BaseException) -> None:
        self._fail(error)
        with self._changed:
            self._failed = True
            self._changed.notify()


def _quickest(engine: Engine, rows: Dataset, samples: int, fail: Fail) -> float:
    """Seconds of the quickest of some queries."""
    probe = _Probe(engine, rows, fail, in_bulk=False)
    found: list[float] = []
    end = time.perf_counter() + _PROBE_S
    while not probe.failed and (len(found) < _PROBE_QUERIES or time.perf_counter() < end):
        found.append(probe.ask(samples))
    probe.close()
    return min(found)


def _rate(engine: Engine, rows: Dataset, fail: Fail) -> float:
    """Samples a second of one long query: ever longer ones, until it took long enough."""
    probe = _Probe(engine, rows, fail, in_bulk=True)
    samples, seconds = 64, 0.0
    while not probe.failed:
        seconds = probe.ask(samples)
        if seconds >= _PROBE_S:
            break
        samples = max(2 * samples, round(samples * min(16.0, 1.2 * _PROBE_S / seconds)))
    probe.close()
    return samples / max(seconds, 1e-9)

"""One call of the load generator, from the address to the figures: reach, warm up, run or search, and leave."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gc
import importlib.metadata
import platform
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from onecard import __version__, host
from onecard.bench.figures import figures_of
from onecard.bench.knee import TOLERANCE, find_knee
from onecard.bench.load import Load, check_load
from onecard.bench.result import BenchResult, Knee, KneePoint, RunResult, Settings
from onecard.bench.run import Stop, run_load
from onecard.bench.samples import cut_samples, draw_samples, sizes_of
from onecard.bench.slo import Slo
from onecard.bench.target import Address, Target
from onecard.errors import EngineError, UsageError

if TYPE_CHECKING:
    from onecard.runtime.engine import Engine

_WARM_STREAMS = 16
_LEAST_WARM_UP_S = 0.5  # where its rate is needed
_START_SHARE = 0.25  # of the warm-up's rate, where a search for the knee begins
_SLOW_QUERIES = 5  # that a point of the search has at least beyond the percentile, on average
_MOST_STRETCH = 4.0  # of a point's duration, to have them
_KNEE_DRAIN_S = 60.0  # what a lost point left behind must not burden the next
_SPARE_FILES = 100


@dataclass(frozen=True)
class BenchOptions:
    """What to do.

    Args:
        address: of the target.
        load: to put on it.
        rows: of a request.
        dimensions: ``S=128``; see :func:`onecard.bench.samples.sizes_of`.
        data: file of named arrays; None for random inputs.
        arrivals: name of the trace's file, for the record.
        slo: that is to be kept; None for none.
        find_knee: look for the highest rate that keeps it.
        tolerance: of the knee.
        warm_up_s: before the figures; 0 for none.
        fields: header fields to send.
        ca: PEM file of authorities to trust (TLS).
        device: of a bundle: ``auto``, ``cpu`` or ``cuda:0``.
        command: the command line, for the record.
    """

    address: Address
    load: Load
    rows: int = 1
    dimensions: tuple[str, ...] = ()
    data: Path | None = None
    arrivals: str = ""
    slo: Slo | None = None
    find_knee: bool = False
    tolerance: float = TOLERANCE
    warm_up_s: float = 1.0
    fields: tuple[str, ...] = ()
    ca: str | None = None
    device: str = "auto"
    command: str = ""


class BenchView:
    """Is told how far it is; does nothing itself."""

    def begin(self, what: str, queries: int, seconds: float) -> None:
        """A part begins; how many queries and seconds it is planned to have, 0 where that is open."""

    def step(self, made: int, ended: int, seconds: float) -> None:
        """So many queries are made and ended, so long after the part's beginning."""

    def point(self, point: KneePoint, low: float, high: float) -> None:
        """A run of the search is over; the knee lies between these rates."""


def run_bench(options: BenchOptions, view: BenchView | None = None) -> BenchResult:
    """Put a load on a target and measure. Ctrl-C ends it early, with what was measured so far.

    Raises:
        UsageError: an option that does not fit, or a model that is not there.
        DataError: data that do not fit the model.
        EngineError: the server cannot be reached, or answers nothing.
        MissingDependencyError: gRPC without grpcio.
        BundleError: a damaged bundle.
    """
    _check(options)
    engine = None
    if options.address.kind == "bundle":
        from onecard.bench.engine_target import open_engine

        engine = open_engine(options.address.folder, options.device)
    try:
        with _event_loop() as loop:
            return loop.run_until_complete(_Session(options, view or BenchView()).run(engine))
    finally:
        if engine is not None:
            engine.close(0.0)


def _check(options: BenchOptions) -> None:
    if options.find_knee:
        if options.slo is None:
            raise UsageError("--find-knee needs an objective:", "pass --slo p99=20ms.")
        if options.load.scenario != "server" or options.load.arrivals:
            raise UsageError("--find-knee sends at random times: it goes with --scenario server and without a trace.")
        if not 0 < options.tolerance < 1:
            raise UsageError(f"--tolerance is {options.tolerance}, but must be between 0 and 1.")
    if options.rows < 1:
        raise UsageError(f"--rows is {options.rows}, but must be 1 or more.")
    load = options.load
    check_load(msgspec.structs.replace(load, qps=load.qps or 1.0) if options.find_knee else load)


@contextlib.contextmanager
def _event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """A loop of its own: uvloop's, if it is installed."""
    try:
        import uvloop

        loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    except ImportError:
        loop = asyncio.new_event_loop()
    try:
        yield loop
    finally:
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


class _Session:
    """What one call shares between its parts.

    Args:
        options: what to do.
        view: told how far it is.
    """

    def __init__(self, options: BenchOptions, view: BenchView) -> None:
        self._options = options
        self._view = view
        self._stop = Stop()

    async def run(self, engine: Engine | None) -> BenchResult:
        options = self._options
        started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        _allow_files(options.load.most_in_flight)
        target = await _open(options, engine)
        try:
            sizes = sizes_of(target.spec, options.rows, options.dimensions)
            requests = _requests(target, options, sizes)
            with _interruptible(self._stop), _quiet_collector():
                load, run, knee = await self._measure(target, requests)
        finally:
            await target.close()
        return BenchResult(
            options.address.text, target.about, _settings(options, load, sizes), _generator(), started,
            options.command, run, knee, self._stop.is_set,
        )  # fmt: skip

    async def _measure(self, target: Target, requests: Sequence[Any]) -> tuple[Load, RunResult | None, Knee | None]:
        load = self._options.load
        rate = await self._warm_up(target, requests)
        if self._stop.is_set:
            return load, None, None
        if self._options.find_knee and self._options.slo is not None:
            load = msgspec.structs.replace(load, qps=load.qps or max(_START_SHARE * rate, 1.0))
            return load, *await self._search(target, requests, load, self._options.slo)
        if load.scenario == "offline" and not load.requests:
            load = msgspec.structs.replace(load, requests=max(load.most_in_flight, int(rate * load.duration_s)))
        return load, await self._run(target, requests, load, "measuring"), None

    async def _warm_up(self, target: Target, requests: Sequence[Any]) -> float:
        """Send before anything is measured; returns the answers a second."""
        load, seconds = self._options.load, self._options.warm_up_s
        is_needed = (load.scenario == "offline" and not load.requests) or (self._options.find_knee and not load.qps)
        seconds = max(seconds, _LEAST_WARM_UP_S) if is_needed else seconds
        if seconds <= 0:
            return 0.0
        streams = load.most_in_flight if load.scenario == "offline" else min(_WARM_STREAMS, load.most_in_flight)
        warm = Load("closed-loop", seconds, concurrency=streams, most_in_flight=streams)
        found = await self._run(target, requests, warm, "warming up")
        if not found.answered and found.queries and not self._stop.is_set:
            reasons = {**found.refused, **found.failed}
            raise EngineError(
                f"none of the first {found.queries} requests was answered: {', '.join(reasons) or 'all are waiting'}.",
                target.said,
            )
        return found.answered_per_s

    async def _run(
        self, target: Target, requests: Sequence[Any], load: Load, what: str, give_up: Slo | None = None
    ) -> RunResult:
        queries = load.requests or len(load.arrivals) or int(load.qps * load.duration_s)
        self._view.begin(what, queries, load.duration_s if load.scenario != "offline" else 0.0)
        raw = await run_load(target, requests, load, self._stop, self._view.step, give_up)
        return figures_of(raw, self._options.rows, self._options.slo)

    async def _search(
        self, target: Target, requests: Sequence[Any], load: Load, slo: Slo
    ) -> tuple[RunResult | None, Knee]:
        best: dict[float, RunResult] = {}

        async def measure(qps: float, number: int) -> RunResult | None:
            wanted_s = _SLOW_QUERIES / max(1 - slo.percentile / 100, 1e-4) / qps
            duration_s = min(max(load.duration_s, wanted_s), _MOST_STRETCH * load.duration_s)
            drain_s = max(load.drain_s, _KNEE_DRAIN_S)
            point = msgspec.structs.replace(
                load, qps=qps, duration_s=duration_s, seed=load.seed + number, requests=0, drain_s=drain_s
            )
            found = await self._run(target, requests, point, f"{qps:,.4g} requests/s", slo)
            if found.interrupted:
                return None
            if not found.shortfall:
                best[qps] = found
            return msgspec.structs.replace(found, seconds=())

        knee = await find_knee(measure, load.qps, 1e3 * slo.limit_s, self._options.tolerance, self._view.point)
        return best.get(knee.qps), knee


async def _open(options: BenchOptions, engine: Engine | None) -> Target:
    address = options.address
    if engine is not None:
        from onecard.bench.engine_target import EngineTarget

        return EngineTarget(engine, {"model": address.folder.absolute().name, "torch": _version("torch")})
    if address.kind == "grpc":
        from onecard.bench.grpc_target import open_grpc

        return await open_grpc(address, options.fields)
    from onecard.bench.http_target import open_http

    return await open_http(address, options.fields, options.ca)


def _requests(target: Target, options: BenchOptions, sizes: dict[str, int]) -> list[Any]:
    if options.data is None:
        samples = draw_samples(target.spec, sizes, options.load.seed)
    else:
        from onecard.arrays import read_arrays

        samples = cut_samples(read_arrays(options.data), target.spec, sizes)
    return [target.prepare(sample) for sample in samples]


@contextlib.contextmanager
def _interruptible(stop: Stop) -> Iterator[None]:
    """Ctrl-C sets ``stop``; a second one ends everything at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        stop.is_set = True
        loop.remove_signal_handler(signal.SIGINT)

    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


@contextlib.contextmanager
def _quiet_collector() -> Iterator[None]:
    """What there is by now is not looked through by the garbage collector while requests are under way."""
    froze = not gc.get_freeze_count()
    if froze:
        gc.collect()
        gc.freeze()
    try:
        yield
    finally:
        if froze:
            gc.unfreeze()


def _allow_files(connections: int) -> None:
    """Raise this process's limit of open files, as far as it may, so that each request can have a connection."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = connections + _SPARE_FILES
        if soft < wanted:
            most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _settings(options: BenchOptions, load: Load, sizes: dict[str, int]) -> Settings:
    return Settings(
        scenario=load.scenario,
        duration_s=load.duration_s,
        qps=load.qps,
        requests=load.requests,
        rows=options.rows,
        sizes=sizes,
        samples=load.samples,
        concurrency=load.concurrency,
        connections=load.most_in_flight,
        warm_up_s=options.warm_up_s,
        drain_s=load.drain_s,
        seed=load.seed,
        data=str(options.data or ""),
        arrivals=options.arrivals,
        objective=str(options.slo or ""),
        find_knee=options.find_knee,
    )


def _generator() -> dict[str, str]:
    """The machine and the versions of the load generator."""
    facts = {
        "processor": host.cpu_model(),
        "cores": str(host.usable_cores()),
        "memory": f"{host.usable_memory() / 2**30:.1f} GiB",
        "system": platform.platform(),
        "python": platform.python_version(),
        "onecard": __version__,
    }
    return facts | {name: version for name in ("uvloop", "grpcio", "numpy") if (version := _version(name))}


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""

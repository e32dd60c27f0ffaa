"""Snapshots of servers that do not exist, with figures that grow as a busy server's would."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from onecard.telemetry.card_sample import CardSample, card_state
from onecard.telemetry.exposition import Compatibility, expose
from onecard.telemetry.histogram import DIFFERENCES, ROWS, Distribution, Histogram
from onecard.telemetry.snapshot import (
    FAILURE_REASONS,
    HISTOGRAMS,
    ModelFigures,
    ProcessFigures,
    SentinelFigures,
    ServerFigures,
    Snapshot,
)

START_S = 1_700_000_000.0


def durations(count: int, value: float) -> Distribution:
    histogram = Histogram()
    histogram.observe_many([value] * count)
    return histogram.copy()


def others(count: int, value: float, bounds: tuple[float, ...]) -> Distribution:
    histogram = Histogram(bounds)
    histogram.observe_many([value] * count)
    return histogram.copy()


def model(name: str, version: str, tick: int, trouble: bool = False, device: str = "cuda:0") -> ModelFigures:
    """100 requests of 4 rows a tick, in batches of 2 requests, 12 ms each; in trouble, 120 ms and with failures."""
    requests = 100 * tick
    failures = dict.fromkeys(FAILURE_REASONS, 10 * tick if trouble else 0) | {"bad_input": tick}
    return ModelFigures(
        name=name,
        version=version,
        variant="inductor+bf16@bucket",
        variants={"B1": "cudagraph", "B8": "inductor+bf16"},
        skipped_variants=1 if trouble else 0,
        state="LOADING" if trouble else "READY",
        device=device,
        queue_requests=95 if trouble else 3,
        queue_bytes=12_000,
        queue_limit_requests=100,
        queue_limit_bytes=1 << 20,
        in_flight=5,
        p99_target_s=0.05,
        admitted=requests + tick,
        requests=requests,
        failures=failures,
        rows=4 * requests,
        padded_rows=requests,
        batches=requests // 2,
        histograms={key: durations(requests, 0.12 if trouble else 0.012) for key in HISTOGRAMS},
        batch_rows=others(requests // 2, 8.0, ROWS),
        request_stages_s={"copy_in": 0.001 * requests, "compute": 0.01 * requests, "copy_out": 0.0005 * requests},
        load_s=1.5,
        memory_bytes={"weights": 100 << 20, "reserved": 500 << 20, "peak": 600 << 20},
        sentinel=SentinelFigures(tick, tick if trouble else 0, others(tick, 0.002, DIFFERENCES)),
    )


def gpu(tick: int, trouble: bool = False) -> CardSample:
    return CardSample(
        time_s=START_S + tick,
        kind="nvidia",
        name="NVIDIA H200",
        lost="it is gone" if trouble else None,
        utilisation=0.97,
        memory_utilisation=0.5,
        memory_used_bytes=(139 << 30) if trouble else (100 << 30),
        memory_total_bytes=140 << 30,
        process_memory_bytes=90 << 30,
        temperature_c=91.0 if trouble else 64.0,
        memory_temperature_c=70.0,
        power_w=600.0,
        power_limit_w=700.0,
        energy_j=600.0 * tick,
        energy_source="counter",
        sm_clock_hz=1.98e9,
        memory_clock_hz=3.2e9,
        throttle_reasons=("sw_power_cap", "hw_thermal") if trouble else ("sw_power_cap",),
        pcie_receive_bytes_per_s=1e9,
        pcie_transmit_bytes_per_s=1e8,
        pcie_link_generation=5,
        pcie_link_width=16,
        ecc_corrected_errors=tick,
        ecc_uncorrected_errors=tick if trouble else 0,
        xid_errors=0,
    )


def cpu(tick: int, trouble: bool = False) -> CardSample:
    return CardSample(
        time_s=START_S + tick,
        kind="cpu",
        name="AMD EPYC 9654",
        utilisation=0.8,
        process_utilisation=0.7,
        cores=8,
        memory_used_bytes=8 << 30,
        memory_total_bytes=16 << 30,
        temperature_c=55.0,
        power_w=90.0,
        energy_j=90.0 * tick,
        energy_source="counter",
        frequency_hz=3.7e9,
        throttle_reasons=(),
        cgroup_cpus=4.0,
        cgroup_throttled_s=0.6 * tick if trouble else 0.001 * tick,
        cgroup_memory_used_bytes=2 << 30,
        cgroup_memory_limit_bytes=4 << 30,
    )


def snapshot(tick: int, trouble: bool = False, on_cpu: bool = False) -> Snapshot:
    """A server with two models, so many ticks after its start."""
    device = "cpu" if on_cpu else "cuda:0"
    host = {"device": "cpu", **card_state(cpu(tick, trouble))}
    return Snapshot(
        time_s=START_S + tick,
        server=ServerFigures(
            version="0.1.0",
            platform="Linux x86_64",
            started_s=START_S,
            ready=not trouble,
            engine_restarts=2 * tick if trouble else 0,
            open_connections=8,
        ),
        models=tuple(model(name, "1", tick, trouble, device) for name in ("resnet50", "resnet50-int8")),
        card=host if on_cpu else {"device": "cuda:0", **card_state(gpu(tick, trouble))},
        **({} if on_cpu else {"host": host}),
        processes=tuple(ProcessFigures(role, START_S, 0.5 * tick, 300 << 20, 12, 40) for role in ("front", "engine")),
    )


@contextmanager
def serving_metrics(read: Callable[[], Snapshot], compatibility: Compatibility = "") -> Iterator[int]:
    """A real HTTP endpoint with ``/metrics``; yields its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = expose(read(), self.headers.get("Accept", ""), compatibility)
            self.send_response(200 if self.path == "/metrics" else 404)
            self.send_header("Content-Type", page.content_type)
            self.send_header("Content-Length", str(len(page.body)))
            self.end_headers()
            self.wfile.write(page.body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join(10)


def ticking(trouble: bool = False, on_cpu: bool = False) -> Callable[[], Snapshot]:
    """Snapshots of a server that goes on while the clock does, a tick each tenth of a second."""
    began = time.monotonic()
    return lambda: snapshot(1 + int(10 * (time.monotonic() - began)), trouble, on_cpu)

"""A server to be attacked: the real front and engine over models that compute nothing but a tag of their inputs.

A "bundle" is a folder with one file, ``null.json``, that :func:`write_null` writes. ``python -m
tests.attacks.null_server NAME=FOLDER... --http-port 0`` serves such folders as ``onecard serve`` serves bundles.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from onecard.errors import BundleError
from onecard.ipc.models import ModelOptions
from onecard.server.http_types import HttpLimits
from onecard.spec import Spec, TensorSpec, parse_spec
from tests.attacks.wire import FACTOR, HANG, KILL, OFFSET, RAISE

if TYPE_CHECKING:
    from torch import Tensor

    from onecard.runtime.engine import Engine

TAGGED = ("x: float32[B,4], B=1..8",)
MIXED = (
    *("count: int64[B,S], B=1..8, S=1..16", "half: float16[B,2]", "flag: bool[B,S]", "pixel: uint8[B,3]"),
    "brain: bfloat16[B,2]",
)
SUFFIX = "_out"
QUICK = HttpLimits(
    max_body_bytes=1 << 20, max_connections=4000,
    head_timeout_s=1, body_timeout_s=1, idle_timeout_s=1.5, write_timeout_s=2, linger_s=0.2,
)  # fmt: skip


class NullBundle(msgspec.Struct, frozen=True):
    """What a folder's ``null.json`` says.

    Args:
        inputs: the spec; each input has one output of its shape and dtype, named with :data:`SUFFIX`.
        delay_ms: how long a batch takes.
        batches: sizes that batches are padded up to.
        fault: what opening it does instead of opening it: ``raise``, ``kill`` or ``hang``; empty for a good one.
    """

    inputs: tuple[str, ...] = TAGGED
    delay_ms: float = 0.0
    batches: tuple[int, ...] = ()
    fault: str = ""


def write_null(folder: Path, bundle: NullBundle | None = None) -> Path:
    """Write a folder that :func:`open_null` opens; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "null.json").write_bytes(msgspec.json.encode(bundle or NullBundle()))
    return folder


def open_null(name: str, path: Path, options: ModelOptions, on_batch: Callable[..., None] | None = None) -> Engine:
    """Open a folder as the engine process opens a bundle.

    Raises:
        BundleError: the folder's fault is ``raise``.
    """
    from onecard.runtime.engine import Engine, EngineOptions
    from onecard.runtime.limits import BatchPolicy
    from onecard.runtime.null import NullModel

    bundle = msgspec.json.decode((path / "null.json").read_bytes(), type=NullBundle)
    if bundle.fault == "raise":
        raise BundleError(f"the version of '{name}' in {path} is broken.", "It was made so.")
    fail(bundle.fault)
    model = NullModel(_spec(bundle.inputs), bundle.batches, compute, bundle.delay_ms / 1e3)
    policy = BatchPolicy(**options.policy)
    more = {} if options.timeout_s is None else {"timeout_s": options.timeout_s}
    return Engine([model], EngineOptions(policy, **more), on_batch)


def _spec(inputs: tuple[str, ...]) -> Spec:
    spec = parse_spec(inputs)
    outputs = tuple(TensorSpec(t.name + SUFFIX, t.dtype, t.shape) for t in spec.inputs)
    return msgspec.structs.replace(spec, outputs=outputs)


def compute(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """``input * 3 + 7``, or ``not input`` of truth values; a poisoned first value of a row of ``x`` does its harm."""
    import torch

    if "x" in inputs:
        first = set(inputs["x"][:, 0].tolist())
        for poison, fault in ((KILL, "kill"), (HANG, "hang"), (RAISE, "raise")):
            if poison in first:
                fail(fault)
    return {
        name + SUFFIX: torch.logical_not(value) if value.dtype == torch.bool else value * FACTOR + OFFSET
        for name, value in inputs.items()
    }


def fail(fault: str) -> None:
    """Die as of a wild pointer, hang for ever, or raise."""
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGSEGV)
    if fault in ("kill", "hang"):
        threading.Event().wait()  # also after the signal, which reaches other threads first: no answer may slip out
    if fault == "raise":
        raise RuntimeError("this row is poisoned")


def main() -> None:
    """Serve, or be the engine process of a server."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("bundles", nargs="*", metavar="NAME=FOLDER")
    words.add_argument("--http-port", type=int, default=0)
    words.add_argument("--grpc-port", type=int, help="0 for one that is free; without it there is no gRPC")
    words.add_argument("--shared-memory-prefix", help="of the system's shared memory that clients may register")
    words.add_argument("--workers", type=int, default=1, help="processes with sockets")
    words.add_argument("--quick", action="store_true", help="short times for clients that are slow or silent")
    words.add_argument("--queue-items", type=int, default=10_000)
    words.add_argument("--max-waiting", type=int, default=10_000, help="requests, while there is no engine")
    words.add_argument("--hang-s", type=float, default=60.0, help="when an engine, or a front, counts as hanging")
    words.add_argument("--drain-s", type=float, default=20.0)
    words.add_argument("--socket", type=Path, help="be the engine process that listens there")
    words.add_argument("--die-with-parent", action="store_true")
    given = words.parse_args()
    logging.basicConfig(level="INFO", format="%(asctime)s %(process)d %(levelname)s %(name)s %(message)s")
    if given.socket is None:
        serve(given)
        return
    from onecard.server.engine_process import die_with_parent, run_engine

    if given.die_with_parent:
        die_with_parent()
    run_engine(given.socket, open_null)
    sys.stderr.flush()
    os._exit(0)  # as the real one: a model that hangs must not keep it


def serve(given: Any) -> None:
    """Run a server until SIGTERM, whose engine process is this same program."""
    from onecard.server.engine_client import ClientOptions
    from onecard.server.engine_guard import GuardOptions
    from onecard.server.grpc_limits import GrpcListen
    from onecard.server.http_server import Listen
    from onecard.server.repository import Source, read_names
    from onecard.server.serve import ServeOptions, run_server
    from onecard.server.worker_keeper import KeeperOptions
    from onecard.server.workers import WorkersOptions

    model = ModelOptions(policy={"queue_items": given.queue_items})
    options = ServeOptions(
        {name: Source(path, model) for name, path in read_names(given.bundles).items()},
        Listen(port=given.http_port),
        QUICK if given.quick else HttpLimits(max_connections=4000),
        client=ClientOptions(max_waiting=given.max_waiting),
        guard=GuardOptions(hang_s=given.hang_s, hang_batch_s=given.hang_s),
        engine=(sys.executable, "-W", "ignore", "-m", "tests.attacks.null_server"),
        shared_memory=given.shared_memory_prefix,
        grpc=None if given.grpc_port is None else GrpcListen(port=given.grpc_port),
        drain_s=given.drain_s,
        workers=WorkersOptions(given.workers, keeper=KeeperOptions(hang_s=given.hang_s)),
    )
    run_server(options, _Announcer())


class _Announcer:
    """Says how far the server is, for :class:`tests.attacks.attacked.Attacked` to read."""

    def listening(self, server: Any) -> None:
        print(f"listening on 127.0.0.1 port {server.port}", file=sys.stderr, flush=True)

    def listening_grpc(self, port: int) -> None:
        print(f"gRPC on port {port}", file=sys.stderr, flush=True)

    def ready(self, serving: Any) -> None:
        print("ready", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

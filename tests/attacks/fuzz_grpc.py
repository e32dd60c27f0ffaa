"""Fuzzing of a whole server over gRPC: ``python -m tests.attacks.fuzz_grpc --requests 100000``.

Every call must be answered in time, with documented statuses and nothing else: what a client does wrong is never
``UNKNOWN`` or ``INTERNAL``. What is not damaged must be answered exactly, on the same connections and on new ones; and
the server must hold no more memory and no more descriptors afterwards than before.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import gc
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from onecard.server.grpc_messages import inference_messages
from tests.attacks.attacked import Attacked, attacked
from tests.attacks.fuzz_grpc_cases import DOCUMENTED, Case, Streamed, Unary, make_case, requests_of
from tests.attacks.fuzz_grpc_peer import INTERNAL_FAULTS, LIMIT_S, look
from tests.attacks.fuzz_grpc_words import REGION, REGION_BYTES, method
from tests.attacks.fuzz_http import Held, grew, held
from tests.attacks.grpc_wire import INFER, fault_of_message, fault_of_response, infer_message
from tests.attacks.loops import run
from tests.attacks.null_server import MIXED, NullBundle

GOOD_EVERY = 500
_REGISTER_EVERY = 200
_CHANNELS = 8
_MOST_FAULTS = 20
DRAIN_S = 100.0
"""Of the server: if a call were still open, its end would take so long."""
MODELS = {"tag": NullBundle(), "mixed": NullBundle(MIXED), "spare": NullBundle()}


@dataclass
class Findings:
    """What a run of the fuzzer saw.

    Args:
        requests: sent, good ones and damaged ones.
        good: checks on new connections that the server still answers rightly.
        statuses: of the calls that a client's library made.
        frames: what became of the connections that it did not make, by their kinds.
        kinds: of the cases.
        faults: what was wrong, each with the number of its case.
    """

    requests: int = 0
    good: int = 0
    statuses: collections.Counter[str] = field(default_factory=collections.Counter)
    frames: collections.Counter[str] = field(default_factory=collections.Counter)
    kinds: collections.Counter[str] = field(default_factory=collections.Counter)
    faults: list[str] = field(default_factory=list)


class Fuzzer:
    """Sends cases to a server.

    Args:
        port: of its gRPC.
        seed: of all cases.
        prefix: of the shared memory that may be registered; see :func:`shared_object`.
        dump: folder for the bytes of cases that went wrong.
        at_once: cases.
    """

    def __init__(self, port: int, seed: int, prefix: str, dump: Path, at_once: int = 64) -> None:
        self._port = port
        self._seed = seed
        self._prefix = prefix
        self._dump = dump
        self._at_once = at_once
        self._next = 0
        self._channels: list[Any] = []
        self.findings = Findings()

    async def run(self, requests: int) -> None:
        """Send so many more requests; no connection is left."""
        goal = self.findings.requests + requests
        async with self._connected():
            await asyncio.gather(*(self._worker(goal) for _ in range(self._at_once)))

    async def only(self, number: int) -> None:
        """Send one case again."""
        case = make_case(self._seed, number, self._prefix)
        async with self._connected():
            await self._register()
            self._note(number, case, await self._send(number, case))

    @contextlib.asynccontextmanager
    async def _connected(self) -> Any:
        self._channels = [self._channel() for _ in range(_CHANNELS)]
        try:
            yield
        finally:
            for channel in self._channels:
                await channel.close()
            self._channels.clear()
            gc.collect()  # what grpcio has for this loop goes with the last of its calls, and not after the loop

    def _channel(self) -> Any:
        own = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1))
        return grpc.aio.insecure_channel(f"127.0.0.1:{self._port}", options=own)

    async def _worker(self, goal: int) -> None:
        findings = self.findings
        while findings.requests < goal and len(findings.faults) < _MOST_FAULTS:
            number, self._next = self._next, self._next + 1
            case = make_case(self._seed, number, self._prefix)
            count = requests_of(case)
            checks = findings.requests % GOOD_EVERY + count >= GOOD_EVERY
            findings.requests += count
            findings.kinds[case.kind] += count
            if number % _REGISTER_EVERY == 0:
                await self._register()
            self._note(number, case, await self._send(number, case))
            if checks:
                await self._check_good(number)

    async def _register(self) -> None:
        """Give the fuzzer's shared memory its name, unless it has it."""
        message = inference_messages()["SystemSharedMemoryRegisterRequest"](
            name=REGION, key=f"/{self._prefix}-fuzz", byte_size=REGION_BYTES
        )
        with contextlib.suppress(grpc.aio.AioRpcError):
            await self._channels[0].unary_unary(method("SystemSharedMemoryRegister"))(message.SerializeToString())

    async def _send(self, number: int, case: Case) -> str:
        channel = self._channels[number % _CHANNELS]
        if isinstance(case, Unary):
            return await self._ask(channel, case)
        if isinstance(case, Streamed):
            return await self._stream(channel, case)
        outcome, fault = await look(self._port, case)
        self.findings.frames[f"{case.kind}: {outcome}"] += 1
        return fault

    async def _ask(self, channel: Any, case: Unary) -> str:
        """A call with one request; what is wrong with its end."""
        limit_s = LIMIT_S if case.timeout_s is None else case.timeout_s
        began = time.monotonic()
        call = channel.unary_unary(case.path)(case.message, timeout=limit_s, metadata=case.metadata)
        answer, details = b"", ""
        try:
            if case.cancel_s is not None:
                await asyncio.sleep(case.cancel_s)
                call.cancel()
            answer, status = await call, "OK"
        except grpc.aio.AioRpcError as error:
            status, details = error.code().name, error.details() or ""
        except asyncio.CancelledError:
            status = "CANCELLED"
        self.findings.statuses[status] += 1
        if time.monotonic() - began >= LIMIT_S:
            return f"no answer within {LIMIT_S} s"
        if status not in case.statuses:
            return f"expected {sorted(case.statuses)}, got {status}: {details[:300]!r}"
        return fault_of_message(answer, case.tag, case.rows) if status == "OK" and case.tag is not None else ""

    async def _stream(self, channel: Any, case: Streamed) -> str:
        """A stream; what is wrong with its answers, or with its end."""
        call = channel.stream_stream(case.path)(_each(case.messages), timeout=LIMIT_S)
        reading = asyncio.ensure_future(_read_all(call))
        if case.cancel_s is not None:
            await asyncio.sleep(case.cancel_s)
            call.cancel()
        answers, status, details = await reading
        self.findings.statuses[status] += 1
        if status not in DOCUMENTED or status == "DEADLINE_EXCEEDED":
            return f"the stream ended with {status}: {details[:300]!r}"
        if case.cancel_s is not None:
            return ""
        if status != "OK" or len(answers) != len(case.messages):
            return f"{len(case.messages)} answers were expected, but {len(answers)} came, and {status}: {details!r}"
        return next((fault for fault in map(_fault_in_stream, answers, case.tags) if fault), "")

    async def _check_good(self, number: int) -> None:
        """A good request on a connection of its own, at once."""
        began = time.monotonic()
        channel = self._channel()
        try:
            answer = await channel.unary_unary(INFER)(infer_message(number, 3), timeout=LIMIT_S)
            fault = fault_of_message(answer, number, 3)
        except grpc.aio.AioRpcError as error:
            fault = f"{error.code().name} {error.details()} after {time.monotonic() - began:.1f} s"
        finally:
            await channel.close()
        self.findings.good += 1
        if fault:
            self.findings.faults.append(f"the good request after case {number}: {fault}")

    def _note(self, number: int, case: Case, fault: str) -> None:
        if not fault:
            return
        self._dump.mkdir(parents=True, exist_ok=True)
        path = self._dump / f"grpc-{self._seed}-{number}.txt"
        path.write_text(repr(case))
        self.findings.faults.append(f"case {number} ({case.kind}, {path}): {fault}")


async def _each(messages: tuple[bytes, ...]) -> Any:
    for message in messages:
        yield message


async def _read_all(call: Any) -> tuple[list[bytes], str, str]:
    """A stream's answers, its status and what was said of that."""
    answers: list[bytes] = []
    try:
        async for answer in call:
            answers.append(answer)
    except grpc.aio.AioRpcError as error:
        return answers, error.code().name, error.details() or ""
    except asyncio.CancelledError:
        return answers, "CANCELLED", ""
    return answers, (await call.code()).name, ""


def _fault_in_stream(answer: bytes, tag: int | None) -> str:
    message = inference_messages()["ModelStreamInferResponse"].FromString(answer)
    if any(word in message.error_message for word in INTERNAL_FAULTS):
        return f"an error of the server's own: {message.error_message!r}"
    if tag is None:
        return ""
    return message.error_message or fault_of_response(message.infer_response, tag, 1)


@contextlib.contextmanager
def shared_object(prefix: str) -> Iterator[None]:
    """The shared-memory object that the fuzzer registers."""
    path = Path("/dev/shm") / f"{prefix}-fuzz"
    path.write_bytes(bytes(REGION_BYTES))
    try:
        yield
    finally:
        path.unlink()


@contextlib.contextmanager
def fuzzed_server() -> Iterator[tuple[Attacked, str]]:
    """A server to be fuzzed, and the prefix of the shared memory that it takes."""
    prefix = f"onecard-fuzz-{os.getpid()}"
    words = ("--quick", "--grpc-port", "0", "--shared-memory-prefix", prefix, "--drain-s", str(DRAIN_S))
    with shared_object(prefix), attacked(MODELS, *words) as server:
        yield server, prefix


def fuzz(server: Attacked, fuzzer: Fuzzer, requests: int, warm_up: int) -> tuple[Held, Held]:
    """Run the fuzzer; what the server held after the warm-up and at the end."""

    async def both() -> tuple[Held, Held]:  # on one loop: grpcio has one poller for all of a process
        await fuzzer.run(warm_up)
        before = await asyncio.to_thread(held, server)
        await fuzzer.run(requests - warm_up)
        return before, await asyncio.to_thread(held, server, before.descriptors)

    return run(both())


def main() -> int:
    """Attack a server of its own, and print the counts."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--requests", type=int, default=100_000)
    words.add_argument("--seed", type=int, default=1)
    words.add_argument("--at-once", type=int, default=64)
    words.add_argument("--only", type=int, help="send the case with this number alone")
    words.add_argument("--dump", type=Path, default=Path(tempfile.gettempdir()) / "onecard-fuzz")
    given = words.parse_args()
    print(f"seed {given.seed}")
    with fuzzed_server() as (server, prefix):
        fuzzer = Fuzzer(server.grpc_port, given.seed, prefix, given.dump, given.at_once)
        findings, began = fuzzer.findings, time.monotonic()
        if given.only is not None:
            run(fuzzer.only(given.only))
        else:
            before, after = fuzz(server, fuzzer, given.requests, min(20_000, given.requests // 4))
            print(f"resident {before.resident_bytes >> 20} MiB -> {after.resident_bytes >> 20} MiB, "
                  f"descriptors {before.descriptors} -> {after.descriptors}")  # fmt: skip
            if grew(before, after):
                findings.faults.append("the server holds more than before")
        alive = server.process.poll() is None
        print(f"{findings.requests} requests, {findings.good} good on new connections in between, "
              f"{time.monotonic() - began:.0f} s; the server {'lives' if alive else 'is dead'}")  # fmt: skip
        print("statuses", dict(sorted(findings.statuses.items())))
        print("frames", dict(sorted(findings.frames.items())))
        print("kinds", dict(findings.kinds))
        if "Traceback" in server.output:
            findings.faults.append(f"a traceback in the server's log:\n{server.output[-3000:]}")
    for fault in findings.faults:
        print("FAULT", fault)
    return 0 if alive and not findings.faults else 1


if __name__ == "__main__":
    sys.exit(main())

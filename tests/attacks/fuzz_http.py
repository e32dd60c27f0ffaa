"""Fuzzing of a whole server over many connections at once: ``python -m tests.attacks.fuzz_http --requests 100000``.

Every connection must be answered or closed in time, with documented statuses and nothing else; what is not damaged must
be answered exactly; and the server must hold no more memory and no more descriptors afterwards than before.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import http
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from tests.attacks.attacked import Attacked, attacked, settled
from tests.attacks.fuzz_cases import DOCUMENTED, SMUGGLED, Case, make_case
from tests.attacks.loops import run
from tests.attacks.null_server import MIXED, QUICK, NullBundle
from tests.attacks.wire import Answer, AnswerReader, MalformedAnswer, fault_of, infer

LIMIT_S = 20.0
"""Within which a connection must be closed: its few requests may each run into a limit of a second."""
GOOD_EVERY = 1000
MOST_GROWTH_BYTES = 24 << 20
"""Of the server's resident memory after its warm-up: allocators settle, leaks go on."""
_MOST_FAULTS = 20
_SMUGGLED_ID = b'"id":"%010d"' % SMUGGLED


@dataclass
class Findings:
    """What a run of the fuzzer saw.

    Args:
        requests: sent, good ones and damaged ones.
        connections: opened.
        good: checks in between that the server still answers rightly.
        again: cases that were sent once more, for they had taken longer than the server waits.
        statuses: of the answers that came.
        kinds: of the cases.
        faults: what was wrong, each with the number of its case.
    """

    requests: int = 0
    connections: int = 0
    good: int = 0
    again: int = 0
    statuses: collections.Counter[int] = field(default_factory=collections.Counter)
    kinds: collections.Counter[str] = field(default_factory=collections.Counter)
    faults: list[str] = field(default_factory=list)


class _Peer(asyncio.Protocol):
    """Keeps all that comes, and notes the end."""

    def __init__(self) -> None:
        self.received: list[bytes] = []
        self.error: Exception | None = None
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop has classes of its own

    def data_received(self, data: bytes) -> None:
        self.received.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.error = exc
        if not self.ended.done():
            self.ended.set_result(None)


class Fuzzer:
    """Sends cases to a server.

    Args:
        port: of the server.
        seed: of all cases.
        dump: folder for the bytes of cases that went wrong.
        at_once: connections.
        patience: how often a case is sent again that was refused as too slow, or cut off, after more time than the
            server gives its clients. All cases take less: the machine had stood still.
    """

    def __init__(self, port: int, seed: int, dump: Path, at_once: int = 128, patience: int = 0) -> None:
        self._port = port
        self._seed = seed
        self._dump = dump
        self._at_once = at_once
        self._patience = patience
        self._next = 0
        self.findings = Findings()

    async def run(self, requests: int) -> None:
        """Send so many more requests."""
        goal = self.findings.requests + requests
        await asyncio.gather(*(self._worker(goal) for _ in range(self._at_once)))

    async def _worker(self, goal: int) -> None:
        findings = self.findings
        while findings.requests < goal and len(findings.faults) < _MOST_FAULTS:
            number, self._next = self._next, self._next + 1
            case = make_case(self._seed, number)
            checks = findings.requests % GOOD_EVERY + case.requests >= GOOD_EVERY
            findings.requests += case.requests
            findings.kinds[case.kind] += case.requests
            self._note(number, case, await self._send_patiently(case))
            if checks:
                await self._check_good(number)

    async def only(self, number: int) -> None:
        """Send one case again."""
        case = make_case(self._seed, number)
        self._note(number, case, (await self._send(case))[0])

    def _note(self, number: int, case: Case, fault: str) -> None:
        if not fault:
            return
        self._dump.mkdir(parents=True, exist_ok=True)
        path = self._dump / f"case-{self._seed}-{number}.bin"
        path.write_bytes(b"".join(case.parts))
        self.findings.faults.append(f"case {number} ({case.kind}, {path}): {fault}")

    async def _connect(self) -> _Peer:
        self.findings.connections += 1
        _, peer = await asyncio.get_running_loop().create_connection(_Peer, "127.0.0.1", self._port)
        return peer

    async def _send_patiently(self, case: Case) -> str:
        for _ in range(self._patience):
            began = time.monotonic()
            fault, is_cut_off = await self._send(case)
            if not is_cut_off or time.monotonic() - began < QUICK.head_timeout_s:
                return fault
            self.findings.again += 1
        return (await self._send(case))[0]

    async def _send(self, case: Case) -> tuple[str, bool]:
        """What is wrong with the answers; and whether that is only that the server did not wait for the requests."""
        try:
            peer = await self._connect()
        except OSError as error:
            return f"no connection: {error}", False
        try:
            due_s = time.monotonic()
            for number, part in enumerate(case.parts):
                if number:
                    due_s += case.pause_s  # a fuzzer that is behind makes no pauses
                    await asyncio.sleep(max(due_s - time.monotonic(), 0.0))
                if peer.ended.done():
                    break
                peer.transport.write(part)
            if case.leaves:
                return "", False
            await asyncio.wait_for(peer.ended, LIMIT_S)
        except asyncio.TimeoutError:
            return f"still open after {LIMIT_S} s, received {b''.join(peer.received)[-300:]!r}", False
        finally:
            peer.transport.abort()
        return self._fault(case, peer)

    def _fault(self, case: Case, peer: _Peer) -> tuple[str, bool]:
        received = b"".join(peer.received)
        try:
            answers, rest = read_answers(received)
        except MalformedAnswer as error:
            return str(error), False
        self.findings.statuses.update(answer.status for answer in answers)
        if strange := {answer.status for answer in answers} - DOCUMENTED:
            return f"statuses {strange} are not documented: {received[-600:]!r}", False
        if rest and not isinstance(peer.error, ConnectionResetError):
            return f"closed within an answer: {rest[:300]!r}", True
        if any(_SMUGGLED_ID in answer.body for answer in answers):
            return "a request was answered that stood inside of another", False
        answers = [answer for answer in answers if answer.status != 100]
        for expected, answer in zip(case.expected, answers, strict=False):
            if fault := expected.fault(answer):
                return fault, answer.status == http.HTTPStatus.REQUEST_TIMEOUT
        if len(answers) < len(case.expected):
            statuses = [answer.status for answer in answers]
            return f"{len(case.expected)} answers were expected, but {statuses} came ({peer.error!r})", True
        if case.exact and len(answers) > len(case.expected):
            return f"more answers than requests: {answers[len(case.expected) :]}", False
        return "", False

    async def _check_good(self, number: int) -> None:
        """A good request on a connection of its own, at once."""
        self.findings.good += 1
        for left in range(self._patience, -1, -1):
            began = time.monotonic()
            fault = await self._good_fault(number)
            if not fault or not left or time.monotonic() - began < QUICK.head_timeout_s:
                break
            self.findings.again += 1
        if fault:
            self.findings.faults.append(f"the good request after case {number}: {fault}")

    async def _good_fault(self, number: int) -> str:
        began = time.monotonic()
        peer = await self._connect()
        try:
            peer.transport.write(infer(number, 3, close=True))
            await asyncio.wait_for(peer.ended, LIMIT_S)
            answers, _ = read_answers(b"".join(peer.received))
            (fault,) = [fault_of(answer, number, 3) if answer.status == 200 else str(answer) for answer in answers]
        except (asyncio.TimeoutError, ValueError) as error:
            fault = f"{error!r} after {time.monotonic() - began:.1f} s"
        finally:
            peer.transport.abort()
        return fault


def read_answers(received: bytes) -> tuple[list[Answer], bytes]:
    """All answers, and the bytes behind the last whole one.

    Raises:
        MalformedAnswer: something else came.
    """
    reader = AnswerReader()
    return reader.feed(received), reader.rest


@dataclass(frozen=True)
class Held:
    """What a server holds when nobody is connected.

    Args:
        resident_bytes: of all its processes.
        descriptors: likewise.
    """

    resident_bytes: int
    descriptors: int


def held(server: Attacked, descriptors: int | None = None) -> Held:
    """Read it once the connections are gone, which takes as long as they linger.

    Args:
        server: under attack.
        descriptors: how many there should be; None to take what there is after a while.
    """
    found = settled(
        server.descriptors, lambda n: descriptors is not None and n <= descriptors, 3 if descriptors is None else 60
    )
    return Held(server.resident_bytes(), found)


def grew(before: Held, after: Held) -> bool:
    """Whether a server holds more than it did."""
    grown_bytes = after.resident_bytes - before.resident_bytes
    return grown_bytes > MOST_GROWTH_BYTES or after.descriptors > before.descriptors


def fuzz(server: Attacked, fuzzer: Fuzzer, requests: int, warm_up: int) -> tuple[Held, Held]:
    """Run the fuzzer; what the server held after the warm-up and at the end."""
    run(fuzzer.run(warm_up))
    before = held(server)
    run(fuzzer.run(requests - warm_up))
    return before, held(server, before.descriptors)


def main() -> int:
    """Attack a server of its own, and print the counts."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--requests", type=int, default=100_000)
    words.add_argument("--seed", type=int, default=1)
    words.add_argument("--at-once", type=int, default=128)
    words.add_argument("--only", type=int, help="send the case with this number alone")
    words.add_argument("--dump", type=Path, default=Path(tempfile.gettempdir()) / "onecard-fuzz")
    given = words.parse_args()
    print(f"seed {given.seed}")
    with attacked({"tag": NullBundle(), "mixed": NullBundle(MIXED)}, "--quick") as server:
        fuzzer = Fuzzer(server.port, given.seed, given.dump, given.at_once)
        began = time.monotonic()
        if given.only is not None:
            run(fuzzer.only(given.only))
        else:
            before, after = fuzz(server, fuzzer, given.requests, min(20_000, given.requests // 4))
            print(f"resident {before.resident_bytes >> 20} MiB -> {after.resident_bytes >> 20} MiB, "
                  f"descriptors {before.descriptors} -> {after.descriptors}")  # fmt: skip
            if grew(before, after):
                fuzzer.findings.faults.append("the server holds more than before")
        findings, alive = fuzzer.findings, server.process.poll() is None
        print(f"{findings.requests} requests on {findings.connections} connections, {findings.good} good in between, "
              f"{time.monotonic() - began:.0f} s; the server {'lives' if alive else 'is dead'}")  # fmt: skip
        print("statuses", dict(sorted(findings.statuses.items())))
        print("kinds", dict(findings.kinds))
        if "Traceback" in server.output:
            findings.faults.append(f"a traceback in the server's log:\n{server.output[-3000:]}")
    for fault in findings.faults:
        print("FAULT", fault)
    return 0 if alive and not findings.faults else 1


if __name__ == "__main__":
    sys.exit(main())

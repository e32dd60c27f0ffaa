"""What the fuzzer sends on one connection, and what must come back: made from a seed and a number, nothing else.

A case is a run of requests. Good ones before the damage must be answered exactly; where the damage leaves no doubt of
where a request ends, so must good ones behind it. Where it leaves doubt, there is one refusal and nothing more.
"""

from __future__ import annotations

import gzip
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from tests.attacks.fuzz_words import DOUBTFUL_CHUNKS, DOUBTFUL_HEADS, OTHER_REQUESTS, PIECES, damaged_json
from tests.attacks.wire import (
    INFER,
    MOST_ROWS,
    Answer,
    fault_of,
    infer,
    infer_compressed,
    infer_in_chunks,
    infer_in_json,
    post,
)

DOCUMENTED = frozenset({100, 200, 400, 404, 405, 408, 411, 413, 414, 415, 417, 429, 431, 501, 503, 504, 505, 507})
REFUSED = frozenset({200, 400, 404, 405, 413, 415, 429, 504})
"""What the application may answer to a whole request that is wrong in itself."""
SMUGGLED = 4_999_999
"""The tag of requests that stand where no request is: its answer must never be seen."""


@dataclass(frozen=True)
class Expected:
    """An answer that must come.

    Args:
        statuses: one of these.
        tag: of the request; None if any content will do.
        rows: likewise.
    """

    statuses: frozenset[int] = frozenset({200})
    tag: int | None = None
    rows: int = 1

    def fault(self, answer: Answer) -> str:
        """What is wrong with the answer; empty if nothing is."""
        if answer.status not in self.statuses:
            return f"expected status {sorted(self.statuses)}, got {answer.status}: {answer.body[:300]!r}"
        return fault_of(answer, self.tag, self.rows) if answer.status == 200 and self.tag is not None else ""


@dataclass(frozen=True)
class Case:
    """What is sent on one connection.

    Args:
        kind: a word for it.
        parts: sent one after the other.
        requests: how many are in it.
        expected: the first answers.
        exact: nothing comes behind those; else anything documented may.
        pause_s: between the parts.
        leaves: the client goes away when it has sent all, without reading.
    """

    kind: str
    parts: tuple[bytes, ...]
    requests: int
    expected: tuple[Expected, ...] = ()
    exact: bool = False
    pause_s: float = 0.0
    leaves: bool = False


def make_case(seed: int, number: int) -> Case:
    """The case with this number; always the same."""
    chance = random.Random(f"{seed}/{number}")
    (make,) = chance.choices([make for make, _ in _KINDS], [weight for _, weight in _KINDS])
    return make(chance, number)


Good: TypeAlias = "tuple[bytes, Expected]"


def _good(chance: random.Random, number: int, close: bool = False) -> Good:
    tag, rows = number % 1_000_000 + 1_000_000 * chance.randrange(3), chance.randint(1, MOST_ROWS)
    fields = ("Connection: close",) if close else ()
    wire = chance.choice(
        [
            lambda: infer(tag, rows, *fields),
            lambda: infer_in_json(tag, rows, *fields),
            lambda: infer(tag, rows, *fields, timeout_us=60_000_000),
        ]
    )()
    return wire, Expected(tag=tag, rows=rows)


def _some_good(chance: random.Random, number: int, most: int) -> tuple[list[bytes], tuple[Expected, ...]]:
    found = [_good(chance, number) for _ in range(chance.randint(0, most))]
    return [wire for wire, _ in found], tuple(expected for _, expected in found)


def _cut(chance: random.Random, wire: bytes, pieces: int) -> tuple[bytes, ...]:
    ends = [0, *sorted(chance.sample(range(1, len(wire)), min(pieces - 1, len(wire) - 1))), len(wire)]
    return tuple(wire[a:b] for a, b in itertools.pairwise(ends))


def _seed_request(chance: random.Random, number: int) -> bytes:
    tag = number % 1_000_000
    return chance.choice(
        [
            lambda: infer(tag, chance.randint(1, MOST_ROWS)),
            lambda: infer_in_json(tag),
            lambda: infer_in_chunks(tag, [chance.randint(1, 40), chance.randint(1, 40)]),
            lambda: infer_compressed(tag),
            lambda: post(damaged_json(chance)),
            lambda: chance.choice(OTHER_REQUESTS),
            lambda: infer(tag, 1, "Expect: 100-continue"),
            lambda: infer(tag, 1, f"X: {'y' * chance.choice([1, 1000, 20_000])}"),
        ]
    )()


def damaged_bytes(chance: random.Random, wire: bytes) -> bytes:
    """Change a few bytes of a request: one flipped, a piece put in, some taken out, some doubled."""
    found = bytearray(wire)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(found) + 1)
        match chance.randrange(5):
            case 0:
                found[place : place + 1] = bytes([chance.randrange(256)])
            case 1:
                found[place : place + chance.randint(0, 3)] = chance.choice(PIECES)
            case 2:
                del found[place : place + chance.randint(1, 20)]
            case 3:
                found[place:place] = found[place : place + chance.randint(1, 60)]
            case _:
                found[place:place] = chance.randbytes(chance.randint(1, 8))
    return bytes(found) or b"\r"


def _bytes(chance: random.Random, number: int) -> Case:
    before, expected = _some_good(chance, number, 2)
    damaged = [damaged_bytes(chance, _seed_request(chance, number)) for _ in range(chance.randint(1, 3))]
    wire = b"".join([*before, *damaged, _good(chance, number, close=True)[0]])
    parts = _cut(chance, wire, chance.choice([1, 1, 1, 2, 5]))
    return Case("bytes", parts, len(before) + len(damaged) + 1, expected, pause_s=0.002)


def _json(chance: random.Random, number: int) -> Case:
    """Bodies that are wrong in what they say, of the right length: the connection goes on."""
    before, expected = _some_good(chance, number, 1)
    wires, answers = list(before), list(expected)
    for _ in range(chance.randint(1, 4)):
        wires.append(_wrong_body(chance))
        answers.append(Expected(REFUSED))
    last, right = _good(chance, number, close=True)
    return Case("json", (b"".join([*wires, last]),), len(wires) + 1, (*answers, right), exact=True)


def _wrong_body(chance: random.Random) -> bytes:
    path = chance.choice([INFER] * 4 + ["/v2/models/mixed/infer"] * 3 + ["/v2/models/none/infer"])
    body = damaged_json(chance)
    if chance.random() < 0.5:
        return post(body, path=path)
    data = chance.randbytes(chance.choice([0, 1, 15, 16, 32, 128, 1000]))
    length = chance.choice([len(body)] * 8 + [0, 1, len(body) - 1, len(body) + len(data), 10**9, 10**12])
    return post(body + data, f"Inference-Header-Content-Length: {length}", path=path)


def _doubtful(chance: random.Random, number: int) -> Case:
    """Heads and chunks that two readers might read in two ways, with another request inside of the doubtful bytes."""
    before, expected = _some_good(chance, number, 2)
    inner = infer(SMUGGLED)
    doubtful = chance.choice([*DOUBTFUL_HEADS, *DOUBTFUL_CHUNKS])
    wire = doubtful.replace(b"@LENGTH@", b"%d" % len(inner)).replace(b"@INNER@", inner)
    refusal = Expected(frozenset({400, 413, 501, 505}))
    parts = _cut(chance, b"".join([*before, wire]), chance.choice([1, 1, 1, 3]))
    return Case("doubtful", parts, len(before) + 1, (*expected, refusal), exact=True, pause_s=0.002)


def _unusual(chance: random.Random, number: int) -> Case:
    """Right requests of the rarer kinds: in chunks, compressed, with an empty line before, asked to go on."""
    wires, expected = [], []
    for _ in range(chance.randint(1, 4)):
        tag, rows = number % 1_000_000 + 1_000_000 * chance.randrange(3), chance.randint(1, MOST_ROWS)
        sizes = [chance.randint(1, 30) for _ in range(chance.randint(0, 6))]
        made = [
            infer_in_chunks(tag, sizes, rows),
            infer_compressed(tag, rows),
            b"\r\n" + infer(tag, rows),
            infer_in_json(tag, rows, "expect: 100-Continue"),
        ]
        wires.append(chance.choice(made))
        expected.append(Expected(tag=tag, rows=rows))
    last, right = _good(chance, number, close=True)
    parts = _cut(chance, b"".join([*wires, last]), chance.choice([1, 2, 8]))
    return Case("unusual", parts, len(wires) + 1, (*expected, right), exact=True, pause_s=0.002)


def _compressed(chance: random.Random, number: int) -> Case:
    """Compressed bodies that are damaged, or far larger than they look."""
    if chance.random() < 0.1:
        body = gzip.compress(bytes(chance.choice([1 << 21, 1 << 23])), 9, mtime=0)
    else:
        body = damaged_bytes(chance, infer_compressed(7).partition(b"\r\n\r\n")[2])
    encoding = chance.choice(["gzip", "deflate", "x-gzip", "GZIP"])
    last, right = _good(chance, number, close=True)
    wire = post(body, f"Content-Encoding: {encoding}") + last
    return Case("compressed", (wire,), 2, (Expected(REFUSED), right), exact=True)


def _pipelined(chance: random.Random, number: int) -> Case:
    found = [_good(chance, number) for _ in range(chance.randint(2, 40))]
    found.append(_good(chance, number, close=True))
    wires, expected = zip(*found, strict=True)
    parts = _cut(chance, b"".join(wires), chance.choice([1, 1, 4]))
    return Case("pipelined", parts, len(found), expected, exact=True, pause_s=0.002)


def _slow(chance: random.Random, number: int) -> Case:
    """A right request that comes in small parts, but in time."""
    wire, right = _good(chance, number, close=True)
    return Case("slow", _cut(chance, wire, 20), 1, (right,), exact=True, pause_s=0.02)


def _half(chance: random.Random, number: int) -> Case:
    """A request that stops in the middle, and a client that then waits: told that it took too long, or closed."""
    before, expected = _some_good(chance, number, 1)
    wire = _seed_request(chance, number)
    parts = (b"".join([*before, wire[: chance.randrange(len(wire))]]),)
    return Case("half", parts, len(before) + 1, expected)


def _left(chance: random.Random, number: int) -> Case:
    """A client that goes away in the middle, or before its answer."""
    wire = b"".join(_seed_request(chance, number) for _ in range(chance.randint(1, 4)))
    parts = _cut(chance, wire[: chance.randint(1, len(wire))], chance.choice([1, 2]))
    return Case("left", parts, 1, pause_s=0.002, leaves=True)


_KINDS: list[tuple[Callable[[random.Random, int], Case], int]] = [
    (_bytes, 40), (_json, 25), (_doubtful, 12), (_unusual, 8), (_compressed, 3), (_pipelined, 2), (_slow, 2),
    (_half, 2), (_left, 6),
]  # fmt: skip

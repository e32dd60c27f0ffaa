"""What the gRPC fuzzer sends without a client's library: connections in HTTP/2 that are broken, odd, slow or left."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tests.attacks.fuzz_grpc_words import damaged, odd_request
from tests.attacks.grpc_wire import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    INFER,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    STREAM,
    WINDOW_UPDATE,
    call,
    data_frames,
    fields,
    frame,
    infer_message,
    literal,
    opening,
    prefixed,
)
from tests.attacks.wire import MOST_ROWS

Wanted = Literal["right", "end", "closed", "any", "nothing"]


@dataclass(frozen=True)
class RawCase:
    """What is sent on a connection of its own.

    Args:
        kind: a word for it.
        parts: sent one after the other.
        wanted: ``right`` is the right answer to the tag, ``end`` an answer of any kind or the end of the call or of
            the connection, ``closed`` the end of the connection, ``any`` whatever comes within a moment; with
            ``nothing`` the client goes away at once.
        stream: of the call that is looked at.
        tag: of its request.
        rows: likewise.
        pause_s: between the parts.
        requests: how many are in it.
        first: whether it is the first call of its connection, whose status can be read.
    """

    kind: str
    parts: tuple[bytes, ...]
    wanted: Wanted
    stream: int = 1
    tag: int = 0
    rows: int = 1
    pause_s: float = 0.0
    requests: int = 1
    first: bool = True


def make_raw(chance: random.Random, number: int) -> RawCase:
    """One of the cases."""
    (make,) = chance.choices([make for make, _ in _KINDS], [weight for _, weight in _KINDS])
    return make(chance, number)


def _tagged(chance: random.Random, number: int) -> tuple[int, int, bytes]:
    tag, rows = number % 1_000_000, chance.randint(1, MOST_ROWS)
    return tag, rows, infer_message(tag, rows)


def _garbage(chance: random.Random, _: int) -> RawCase:
    """Something other than HTTP/2."""
    what = chance.choice(
        [
            chance.randbytes(chance.choice([24, 200, 5000])),
            b"GET /v2/health/live HTTP/1.1\r\nHost: test\r\n\r\n",
            b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(40),
            PREFACE.replace(b"SM", b"XX"),
            b"PRI * HTTP/1.1\r\n\r\nSM\r\n\r\n" + bytes(20),
        ]
    )
    return RawCase("garbage", (what,), "closed")


def _cut_off(chance: random.Random, number: int) -> RawCase:
    """A call that stops somewhere, and a client that goes away, with or without a word."""
    wire = opening() + b"".join(call(_tagged(chance, number)[2], path=chance.choice([INFER, STREAM])))
    return RawCase("cut off", (wire[: chance.randrange(len(wire))],), chance.choice(["nothing", "any"]))


def _mutated(chance: random.Random, number: int) -> RawCase:
    """A whole call with a few bytes changed, anywhere."""
    wire = b"".join(call(_tagged(chance, number)[2]))
    whole = opening() + damaged(chance, wire) if chance.random() < 0.8 else damaged(chance, opening() + wire)
    return RawCase("mutated", (whole,), "any")


def _harmless(chance: random.Random, number: int) -> RawCase:
    """What HTTP/2 allows, however rare: the answer must be right."""
    tag, rows, message = _tagged(chance, number)
    head, *body = call(message)
    parts = chance.choice(
        [
            [head, *data_frames(prefixed(message), each=chance.choice([1, 7, 50]))],
            [frame(0x77, 0xFF, 0, b"unknown"), head, frame(0x42, 0, 1, b"x" * 50), *body],
            [frame(PING, 0, 0, b"12345678"), head, *body, frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 65_535))],
            [frame(PRIORITY, 0, 1, struct.pack(">IB", 3, 10)), head, *body],
            [frame(HEADERS, 0, 1, fields()[:20]), frame(CONTINUATION, END_HEADERS, 1, fields()[20:]), *body],
            [head, frame(SETTINGS, 0, 0, struct.pack(">HI", 0x4242, 7)), *body, frame(SETTINGS, ACK, 0)],
            [frame(HEADERS, END_HEADERS, 1, fields(INFER, (b"odd", b"x" * 4000))), *body],
        ]
    )
    return RawCase("harmless", (opening(), *parts), "right", tag=tag, rows=rows, pause_s=chance.choice([0.0, 0.001]))


def _slow(chance: random.Random, number: int) -> RawCase:
    """A right call in small parts, but in time."""
    tag, rows, message = _tagged(chance, number)
    wire = opening() + b"".join(call(message))
    size = len(wire) // 20 + 1
    parts = tuple(wire[at : at + size] for at in range(0, len(wire), size))
    return RawCase("slow", parts, "right", tag=tag, rows=rows, pause_s=0.01)


def _wrong_prefix(chance: random.Random, number: int) -> RawCase:
    """A message whose length or flag is not true, or more messages than one, or none."""
    message = _tagged(chance, number)[2]
    length = len(message)
    data = chance.choice(
        [
            prefixed(message, length=length + chance.choice([1, 1000, 2**31])),
            prefixed(message, length=length - 1),
            prefixed(message, length=0),
            prefixed(message, length=2**32 - 1),
            prefixed(message, compressed=1),
            prefixed(message, compressed=chance.randrange(2, 256)),
            prefixed(message) * 2,
            prefixed(message)[: chance.randrange(5)],
            b"",
        ]
    )
    head = frame(HEADERS, END_HEADERS, 1, fields(chance.choice([INFER, INFER, STREAM])))
    return RawCase("prefix", (opening() + head + b"".join(data_frames(data)),), "end")


def _odd_fields(chance: random.Random, number: int) -> RawCase:
    """Header fields that are missing, doubled, malformed or too large."""
    body = data_frames(prefixed(_tagged(chance, number)[2]))
    block = chance.choice(
        [
            *(fields(without=name) for name in (b":path", b":method", b":scheme", b"content-type", b"te")),
            fields(INFER, (b":path", INFER.encode())),
            fields(INFER, (b"grpc-timeout", chance.choice([b"", b"x", b"-1S", b"99999999999S", b"1", b"0n", b"1_0m"]))),
            fields(INFER, (b"grpc-encoding", chance.choice([b"gzip", b"none", b"", b"\xff"]))),
            fields(INFER, (b"content-type", b"text/plain")),
            fields(INFER, (b"Upper", b"x")),
            fields(INFER, (b"nul", b"a\0b\r\n")),
            fields(INFER, (b"", b"x")),
            fields(INFER, (b"connection", b"close"), (b"transfer-encoding", b"chunked")),
            fields(INFER, (b"odd-bin", b"!!!")),
            fields(INFER, (b"large", b"x" * 15_000)),
            fields("", without=b""),
            fields("x" * 8000),
            fields()
            + chance.choice([b"\xff\xff\xff\xff\xff\xff", b"\x80", b"\xbf", b"\0\xff\xff\xff\xff\x0f", b"\0\x01"]),
            fields() + b"\x3f\xff\xff\xff\xff\x0f",
            literal(b"x", b"y"),
            chance.randbytes(60),
        ]
    )
    return RawCase("fields", (opening() + frame(HEADERS, END_HEADERS, 1, block) + b"".join(body),), "any")


def _wrong_frames(chance: random.Random, number: int) -> RawCase:
    """Frames that may not be there, or not so; and padding, which gRPC's core does not take."""
    message = _tagged(chance, number)[2]
    head, *body = call(message)
    bad = chance.choice(
        [
            frame(DATA, END_STREAM | PADDED, 1, b"\x09" + prefixed(message) + bytes(9)),
            frame(DATA, 0, 0, b"x"),
            frame(DATA, 0, 7, b"x"),
            frame(HEADERS, END_HEADERS, 2, fields()),
            frame(HEADERS, END_HEADERS, 0, fields()),
            frame(HEADERS, END_HEADERS | PADDED, 3, b"\xff" + fields()[:50]),
            frame(SETTINGS, 0, 0, b"x" * 5),
            frame(SETTINGS, 0, 1),
            frame(SETTINGS, ACK, 0, b"x" * 6),
            frame(SETTINGS, 0, 0, struct.pack(">HIHI", 4, 2**32 - 1, 5, 1)),
            frame(WINDOW_UPDATE, 0, 0, bytes(4)),
            frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**31 - 1)) * 2,
            frame(WINDOW_UPDATE, 0, 1, b"xx"),
            frame(PING, 0, 0, b"short"),
            frame(PING, 0, 1, b"12345678"),
            frame(PUSH_PROMISE, END_HEADERS, 1, struct.pack(">I", 2) + fields()),
            frame(PRIORITY, 0, 1, struct.pack(">IB", 1, 0)),
            frame(RST_STREAM, 0, 0, bytes(4)),
            frame(RST_STREAM, 0, 9, bytes(4)),
            frame(GOAWAY, 0, 0, bytes(8)),
            frame(GOAWAY, 0, 3, bytes(3)),
            frame(CONTINUATION, END_HEADERS, 1, fields()),
            frame(chance.randrange(256), chance.randrange(256), chance.choice([0, 1, 2, 3]), chance.randbytes(30)),
            frame(DATA, 0, 1, b"", length=2**24 - 1),
        ]
    )
    frames = [head, *body]
    frames.insert(chance.randrange(len(frames) + 1), bad)
    return RawCase("frames", (opening(), *frames), "any", pause_s=chance.choice([0.0, 0.001]))


def _flood(chance: random.Random, number: int) -> RawCase:
    """Many small frames, at no great rate, and a right call behind them."""
    tag, rows, message = _tagged(chance, number)
    small = chance.choice(
        [
            frame(SETTINGS, 0, 0),
            frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 65_535)),
            frame(PING, 0, 0, b"12345678"),
            frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1)),
            frame(PRIORITY, 0, 5, struct.pack(">IB", 3, 1)),
        ]
    )
    parts = [small * 20] * chance.choice([1, 5, 10])
    return RawCase("flood", (opening(), *parts, b"".join(call(message))), "end", tag=tag, rows=rows, pause_s=0.002)


def _resets(chance: random.Random, number: int) -> RawCase:
    """Calls that are reset as soon as they are made, and one that is not."""
    tag, rows, message = _tagged(chance, number)
    count = chance.choice([1, 10, 50])
    parts = []
    for n in range(count):
        wire = b"".join(call(message, 2 * n + 1))
        parts += [wire, frame(RST_STREAM, 0, 2 * n + 1, struct.pack(">I", 8))]
    last = 2 * count + 1
    wire = b"".join((*parts, *call(message, last)))
    return RawCase("resets", (opening() + wire,), "end", last, tag, rows, requests=count + 1, first=False)


def _endless_head(chance: random.Random, _: int) -> RawCase:
    """Header fields without an end."""
    each = literal(b"x", b"y" * chance.choice([1, 200]))
    parts = [frame(HEADERS, 0, 1, fields()), *[frame(CONTINUATION, 0, 1, each * 20) for _ in range(30)]]
    return RawCase("endless", (opening(), *parts), "any")


def _several(chance: random.Random, number: int) -> RawCase:
    """Calls side by side on one connection, wrong ones and a right one at the end."""
    tag, rows, message = _tagged(chance, number)
    count = chance.randint(1, 6)
    frames = [b"".join(call(odd_request(chance), 2 * n + 1)) for n in range(count)]
    last = 2 * count + 1
    wire = b"".join((*frames, *call(message, last)))
    return RawCase("several", (opening() + wire,), "right", last, tag, rows, requests=count + 1, first=False)


_KINDS: list[tuple[Callable[[random.Random, int], RawCase], float]] = [
    (_garbage, 8), (_cut_off, 18), (_mutated, 25), (_harmless, 12), (_slow, 3), (_wrong_prefix, 10), (_odd_fields, 12),
    (_wrong_frames, 12), (_flood, 3), (_resets, 2), (_endless_head, 1), (_several, 6),
]  # fmt: skip

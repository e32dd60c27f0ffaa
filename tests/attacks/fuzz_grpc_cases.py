"""What the gRPC fuzzer asks through a client's library, and what may come back: made from a seed and a number alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from onecard.server.grpc_messages import HEALTH_SERVICE
from tests.attacks.fuzz_grpc_frames import RawCase, make_raw
from tests.attacks.fuzz_grpc_words import (
    ABSENT,
    CONTROL,
    HEALTH,
    MEMORY,
    PIECES,
    READING,
    UNTOLD,
    asked,
    damaged,
    in_region,
    many_fields,
    method,
    odd_request,
    some_message,
)
from tests.attacks.grpc_wire import INFER, infer_message
from tests.attacks.wire import MOST_ROWS

Metadata: TypeAlias = "tuple[tuple[str, str | bytes], ...]"
DOCUMENTED = frozenset(
    {
        *("OK", "CANCELLED", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "UNIMPLEMENTED", "UNAVAILABLE"),
        *("DEADLINE_EXCEEDED", "UNAUTHENTICATED", "PERMISSION_DENIED"),
    }
)
RIGHT = frozenset({"OK"})
REFUSED = frozenset({"OK", "INVALID_ARGUMENT", "NOT_FOUND", "DEADLINE_EXCEEDED"})
"""What a request for inference that is wrong in itself may be answered."""
_SPARE = "spare"
_MOST_BYTES = 1 << 20
"""Of a message, with the server's ``--quick``."""


@dataclass(frozen=True)
class Unary:
    """A call with one request.

    Args:
        kind: a word for it.
        path: of the method.
        message: its request.
        statuses: one of these must come.
        tag: of the request; None if any content will do.
        rows: likewise.
        metadata: sent before the request.
        timeout_s: the call's deadline; None for the fuzzer's own.
        cancel_s: after which the client gives up; None if it does not.
    """

    kind: str
    path: str
    message: bytes
    statuses: frozenset[str]
    tag: int | None = None
    rows: int = 1
    metadata: Metadata = ()
    timeout_s: float | None = None
    cancel_s: float | None = None


@dataclass(frozen=True)
class Streamed:
    """A ``ModelStreamInfer``, or a watch of the server's health.

    Args:
        kind: a word for it.
        path: of the method.
        messages: its requests.
        tags: of each, in their order; None of one that is damaged.
        cancel_s: after which the client gives up; None if it ends the stream and waits for all answers.
    """

    kind: str
    path: str
    messages: tuple[bytes, ...]
    tags: tuple[int | None, ...] = ()
    cancel_s: float | None = None


Case: TypeAlias = "Unary | Streamed | RawCase"


def make_case(seed: int, number: int, prefix: str) -> Case:
    """The case with this number; always the same.

    Args:
        seed: of all cases.
        number: of this one.
        prefix: of the shared memory that may be registered.
    """
    chance = random.Random(f"{seed}/{number}")
    (make,) = chance.choices([make for make, _ in _KINDS], [weight for _, weight in _KINDS])
    return make(chance, number, prefix)


def requests_of(case: Case) -> int:
    """How many requests are in a case."""
    return len(case.messages) if isinstance(case, Streamed) else case.requests if isinstance(case, RawCase) else 1


def _good(chance: random.Random, number: int, _: str) -> Case:
    tag, rows = number % 1_000_000, chance.randint(1, MOST_ROWS)
    return Unary("good", INFER, infer_message(tag, rows, chance.random() < 0.3), RIGHT, tag, rows)


def _bytes(chance: random.Random, number: int, _: str) -> Case:
    """A message with a few bytes changed."""
    return Unary("bytes", INFER, damaged(chance, some_message(chance, number)), REFUSED)


def _odd(chance: random.Random, _: int, __: str) -> Case:
    """A message that can be read, and says something wrong."""
    return Unary("odd", INFER, odd_request(chance), REFUSED)


def _region(chance: random.Random, number: int, _: str) -> Case:
    return Unary("region", INFER, in_region(chance, number), REFUSED)


def _large(chance: random.Random, number: int, _: str) -> Case:
    """Too many fields, or more bytes than are taken."""
    if chance.random() < 0.7:
        return Unary("large", INFER, many_fields(chance), REFUSED)
    spare = _MOST_BYTES + chance.choice([1, 1000])
    statuses = frozenset({"RESOURCE_EXHAUSTED"})
    return Unary("large", INFER, infer_message(number % 1_000_000) + b"\x3a" + b"x" * spare, statuses)


def _method(chance: random.Random, _: int, prefix: str) -> Case:
    """Something other than inference."""
    names, statuses = chance.choice(
        [
            (READING, frozenset({"OK", "INVALID_ARGUMENT", "NOT_FOUND"})),
            (HEALTH, frozenset({"OK", "INVALID_ARGUMENT"})),
            (MEMORY, frozenset({"OK", "INVALID_ARGUMENT", "NOT_FOUND"})),
            (ABSENT, frozenset({"UNIMPLEMENTED", "INVALID_ARGUMENT"})),
            (UNTOLD, frozenset({"UNIMPLEMENTED"})),
        ]
    )
    name = chance.choice(names)
    return Unary("method", method(name), asked(chance, name, prefix), statuses)


def _unknown(chance: random.Random, _: int, __: str) -> Case:
    """A method that there is not."""
    paths = ["/", "//", "/x/y", method("Infer"), method("modelinfer"), INFER + "/", "/" + "m" * 3000, "/%2e%2e/x"]
    return Unary("unknown", chance.choice(paths), chance.choice(PIECES), frozenset({"UNIMPLEMENTED"}))


def _control(chance: random.Random, _: int, prefix: str) -> Case:
    """A model that nobody else asks for comes and goes; others are not there."""
    name = chance.choice(CONTROL)
    if chance.random() < 0.5:
        text = _SPARE.encode()
        return Unary("control", method(name), b"\x12" + bytes((len(text),)) + text, frozenset({"OK", "UNAVAILABLE"}))
    message = asked(chance, name, prefix).replace(b"tag", b"gat").replace(b"mixed", b"dexim")
    return Unary("control", method(name), message, frozenset({"OK", "INVALID_ARGUMENT", "NOT_FOUND"}))


def _health(chance: random.Random, _: int, __: str) -> Case:
    service = chance.choice([b"", b"\x0a\x01x", b"\x0a\x1einference.GRPCInferenceService", *PIECES])
    if chance.random() < 0.5:
        return Unary("health", f"/{HEALTH_SERVICE}/Check", service, frozenset({"OK", "NOT_FOUND", "INVALID_ARGUMENT"}))
    return Streamed("watch", f"/{HEALTH_SERVICE}/Watch", (service,), cancel_s=chance.choice([0.0, 0.002, 0.02]))


def _metadata(chance: random.Random, number: int, _: str) -> Case:
    """A right request with metadata that nobody asked for."""
    tag, rows = number % 1_000_000, chance.randint(1, MOST_ROWS)
    fields: list[tuple[str, str | bytes]] = [
        ("authorization", chance.choice(["", "Bearer", "Bearer " + "x" * 500, "Basic eDp5"])),
        ("x-forwarded-for", chance.choice(["", "::1", "203.0.113.9, 10.0.0.1", "y" * 300])),
        ("odd-bin", chance.randbytes(chance.choice([0, 1, 64]))),
        *(("again", str(n)) for n in range(chance.choice([0, 2, 40]))),
    ]
    picked = tuple(chance.sample(fields, chance.randint(1, len(fields))))
    return Unary("metadata", INFER, infer_message(tag, rows), RIGHT, tag, rows, picked)


def _too_much_metadata(chance: random.Random, _: int, __: str) -> Case:
    many = (("large", "x" * chance.choice([20_000, 100_000])),)
    return Unary("metadata", INFER, infer_message(1), frozenset({"RESOURCE_EXHAUSTED"}), metadata=many)


def _late(chance: random.Random, number: int, _: str) -> Case:
    """A call that is given up, by its deadline or by the client."""
    message = infer_message(number % 1_000_000, chance.randint(1, MOST_ROWS))
    statuses = frozenset({"OK", "CANCELLED"})
    if chance.random() < 0.5:  # the server may notice the deadline first, and cancel
        statuses |= {"DEADLINE_EXCEEDED"}
        return Unary("late", INFER, message, statuses, timeout_s=chance.choice([0.0, 1e-4, 1e-3, 5e-3]))
    return Unary("late", INFER, message, statuses, cancel_s=chance.choice([0.0, 1e-3, 3e-3]))


def _stream(chance: random.Random, number: int, _: str) -> Case:
    """Right requests and damaged ones in a stream; each has its answer, in order."""
    messages: list[bytes] = []
    tags: list[int | None] = []
    for n in range(chance.choice([0, 1, 3, 8, 40])):
        good = chance.random() < 0.7
        tag = (number * 41 + n) % 1_000_000
        messages.append(infer_message(tag) if good else damaged(chance, some_message(chance, number)))
        tags.append(tag if good else None)
    cancel_s = chance.choice([None, None, None, 0.0, 0.002, 0.01])
    return Streamed("stream", method("ModelStreamInfer"), tuple(messages), tuple(tags), cancel_s)


def _raw(chance: random.Random, number: int, _: str) -> Case:
    return make_raw(chance, number)


_KINDS: list[tuple[Callable[[random.Random, int, str], Case], float]] = [
    (_good, 12), (_bytes, 30), (_odd, 22), (_region, 6), (_large, 0.5), (_method, 10), (_unknown, 1.5), (_control, 0.1),
    (_health, 1.5), (_metadata, 2), (_too_much_metadata, 0.2), (_late, 4), (_stream, 1), (_raw, 6),
]  # fmt: skip

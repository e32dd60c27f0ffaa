"""What a front and the engine say to each other, in packets of messages, over a Unix socket that both hold open.

Tensors travel in shared memory. Each front makes two segments of it and hands both over when it connects: it writes
requests into the first and alone decides what is free there; the engine does the same with answers in the second. The
end of the socket is the end of the connection, whoever died: a new connection has new segments for answers, so nothing
that an old engine wrote late can be taken for an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import msgspec

from onecard.ipc.models import ModelOptions, ModelState
from onecard.ipc.tensors import Target, Tensor

VERSION = 1
"""Of these messages; both sides are of one installation, so another one is refused."""

_SHORT_ARRAY = 0x90  # "fixarray" of the MessagePack specification, with the length in its lower four bits


class Message(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=True):
    """Base of all messages."""


# From a front to the engine


class Hello(Message, frozen=True):
    """The first message; with it come the two segments' descriptors, requests first.

    Args:
        version: of the messages.
        pid: of the front.
        request_bytes: size of the segment of requests.
        answer_bytes: size of the segment of answers.
    """

    version: int
    pid: int
    request_bytes: int
    answer_bytes: int


class Infer(Message, frozen=True):
    """A request.

    Args:
        id: of this front's own counting; never used twice, also not over a new connection.
        model: its name.
        mark: where the request's mark (see :mod:`onecard.ipc.tensors`) lies in the segment of requests.
        inputs: all with offsets; they do not change before the answer.
        deadline: in seconds of ``time.monotonic``, a clock that all processes of a machine share; None for the model's
            default.
        priority: 0 goes first.
        client: whose request it is, for fairness.
        alone: it may have killed an engine: run it when nothing else runs.
        targets: outputs that are to be written to a client's memory on the device.
        traced: whether the answer is to tell when the model's stages were.
    """

    id: int
    model: str
    mark: int
    inputs: tuple[Tensor, ...]
    deadline: float | None = None
    priority: int = 0
    client: str = ""
    alone: bool = False
    targets: tuple[Target, ...] = ()
    traced: bool = False


class Cancel(Message, frozen=True):
    """Nobody waits for this request any more. It is still ended by an :class:`Answered` or a :class:`Refused`."""

    id: int


class Sent(Message, frozen=True):
    """These parts of the segment of answers are free again."""

    offsets: tuple[int, ...]


class Load(Message, frozen=True):
    """Open a bundle beside what serves under this name, prove and warm it, then let it serve; answered by a `Done`.

    Args:
        call: to find the answer by.
        name: of the model.
        path: of the bundle.
        options: how to open it.
        version: to give to it; empty for one more than the last.
    """

    call: int
    name: str
    path: str
    options: ModelOptions
    version: str = ""


class Unload(Message, frozen=True):
    """Take no more requests for a model, answer those that wait, release it; answered by :class:`Done`.

    Args:
        call: to find the answer by.
        name: of the model.
        drain_s: how long what waits may take.
    """

    call: int
    name: str
    drain_s: float = 30.0


class OpenRegion(Message, frozen=True):
    """Open memory of the device that another process shares, for this front's requests; answered by :class:`Done`.

    Args:
        call: to find the answer by.
        name: of the region.
        handle: 64 bytes, a ``cudaIpcMemHandle_t``.
        device: the card's number.
        byte_size: of the region.
    """

    call: int
    name: str
    handle: bytes
    device: int
    byte_size: int


class CloseRegion(Message, frozen=True):
    """Forget a region; answered by :class:`Done`."""

    call: int
    name: str


class Ask(Message, frozen=True):
    """What the engine counts and holds; answered by :class:`Told`."""

    call: int


class Ping(Message, frozen=True):
    """Answered by :class:`Pong`."""

    call: int


class Quit(Message, frozen=True):
    """End, once what waits is answered or the time is over."""

    drain_s: float = 30.0


# From the engine to a front


class Welcome(Message, frozen=True):
    """The answer to :class:`Hello`. :class:`Models` follows."""

    version: int
    pid: int


class Models(Message, frozen=True):
    """All models, whenever one of them changed; sent to every front."""

    models: tuple[ModelState, ...]


class Stages(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """When a traced request was run: moments in seconds of ``time.monotonic``, and durations in seconds.

    Args:
        began: its first row was in a batch.
        launched: its last batch began.
        ended: that batch's answers were on the host.
        copy_in_s: collecting that batch's rows, and bringing them to the device.
        compute_s: the model.
        copy_out_s: bringing the answers to the host.
    """

    began: float
    launched: float
    ended: float
    copy_in_s: float
    compute_s: float
    copy_out_s: float


class Answered(Message, frozen=True):
    """A request's answer.

    Args:
        id: of the request.
        outputs: in the message, or in the segment of answers until the front says :class:`Sent`.
        queue_s: how long it waited.
        total_s: from when the engine had it to its answer.
        rows: of the batch that it was answered with.
        version: of the model that answered.
        stages: when it was run, if it is traced.
    """

    id: int
    outputs: tuple[Tensor, ...]
    queue_s: float
    total_s: float
    rows: int
    version: str = ""
    stages: Stages | None = None


class Refused(Message, frozen=True):
    """A request without an answer, or a call that failed.

    Args:
        id: of the request.
        kind: name of the class in :mod:`onecard.errors`.
        message: of the error.
        cure: likewise.
        retry_after_s: where it is worth trying again later.
    """

    id: int
    kind: str
    message: str
    cure: str = ""
    retry_after_s: float = 0.0


class Done(Message, frozen=True):
    """A call was carried out, or failed.

    Args:
        call: which.
        kind: empty, or the error's class in :mod:`onecard.errors`.
        message: of the error.
        cure: likewise.
    """

    call: int
    kind: str = ""
    message: str = ""
    cure: str = ""


class Told(Message, frozen=True):
    """What was asked for.

    Args:
        call: which.
        statistics: of the protocol's statistics extension: its JSON for all models.
        memory: of each model: ``onecard.runtime.usage.MemoryUse`` as a dict.
        queued: requests that wait, of all models.
        figures: of each model, for metrics: see :mod:`onecard.server.engine_figures`.
    """

    call: int
    statistics: bytes
    memory: dict[str, dict[str, float]]
    queued: int
    figures: bytes = b""


class Pong(Message, frozen=True):
    """It lives.

    Args:
        call: which.
        running_s: for how long the oldest batch that is under way has been; 0 if none is.
        loading: whether a model is being opened, which may keep the engine from answering for seconds.
    """

    call: int
    running_s: float = 0.0
    loading: bool = False


ToEngine: TypeAlias = Hello | Infer | Cancel | Sent | Load | Unload | OpenRegion | CloseRegion | Ask | Ping | Quit
ToFront: TypeAlias = Welcome | Models | Answered | Refused | Done | Told | Pong

encode = msgspec.msgpack.Encoder().encode
"""One message as bytes; :func:`packet` makes of several what is sent."""

decode_to_engine = msgspec.msgpack.Decoder(list[ToEngine]).decode
"""The messages of a packet from a front."""

decode_to_front = msgspec.msgpack.Decoder(list[ToFront]).decode
"""The messages of a packet from the engine."""

MOST_IN_PACKET = 15
PACKET_BYTES = 64 << 10
"""A packet is not made larger than that by joining messages."""


def packet(messages: Sequence[bytes]) -> bytes:
    """A packet of encoded messages, at most :data:`MOST_IN_PACKET`: MessagePack's array of them."""
    return b"%c%b" % (_SHORT_ARRAY | len(messages), b"".join(messages))

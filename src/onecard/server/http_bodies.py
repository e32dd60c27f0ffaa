"""Where a body is received: in the application's memory, or in counted memory while it is in chunks or compressed."""

from __future__ import annotations

from dataclasses import replace

from onecard.server.http_chunked import ChunkedBody
from onecard.server.http_encoding import decompress
from onecard.server.http_head import too_large
from onecard.server.http_shared import Shared, fresh_memory
from onecard.server.http_types import EMPTY, Buffer, HttpLimits, Request


def begin_body(shared: Shared, request: Request) -> ChunkedBody | None:
    """Let the application refuse a request whose body is to come, and get what that is received into.

    Args:
        shared: what all connections share.
        request: whose head came.

    Returns:
        What decodes a body in chunks; None for one that goes straight into ``request.body``.

    Raises:
        HttpError: 413, it is too large for what is asked; 503, there is no memory for it.
        Exception: whatever the application refuses with.
    """
    if shared.service.admit is not None:
        shared.service.admit(request)
    head = request.head
    most_bytes = request.most_body_bytes
    if most_bytes is not None and head.content_length > most_bytes:
        raise too_large(most_bytes)
    if head.chunked:
        request.hold = shared.held.begin()
        return ChunkedBody(_limits(shared, request), request.hold)
    if head.encoding:
        request.hold = shared.held.begin()
        request.hold.grow(head.content_length)
        request.body = fresh_memory(request, head.content_length)
    else:
        request.body = _checked(shared.allocate(request, head.content_length), head.content_length)
    return None


def end_chunks(shared: Shared, request: Request, chunks: ChunkedBody) -> None:
    """Give a request its body, of which the last chunk came.

    Raises:
        Exception: whatever the application refuses with.
    """
    content = memoryview(chunks.take())
    if request.head.encoding:
        request.body = content
    else:
        _place(shared, request, content)


async def make_plain(shared: Shared, request: Request) -> None:
    """Decompress a request's body.

    Raises:
        HttpError: it is damaged, or too large; 503, there is no memory for it.
    """
    packed, encoding, most_bytes = request.body, request.head.encoding, _limits(shared, request).max_body_bytes
    try:
        plain = await shared.loop.run_in_executor(None, decompress, packed, encoding, most_bytes, request.hold)
        _place(shared, request, plain)
    except BaseException:
        request.body, request.hold = EMPTY, None  # a thread that is still at it keeps both
        raise


def _limits(shared: Shared, request: Request) -> HttpLimits:
    limits, most_bytes = shared.limits, request.most_body_bytes
    if most_bytes is None or most_bytes >= limits.max_body_bytes:
        return limits
    return replace(limits, max_body_bytes=most_bytes)


def _place(shared: Shared, request: Request, content: Buffer) -> None:
    """Copy a whole body to where the application wants it; what it was received into is free then."""
    memory = _checked(shared.allocate(request, len(content)), len(content))
    memory[:] = content
    request.body, request.hold = memory, None


def _checked(memory: memoryview, length: int) -> memoryview:
    if memory.nbytes != length or memory.format != "B":
        raise TypeError(f"the allocator gave {memory.nbytes} bytes of {memory.format}, not {length} of B")
    return memory

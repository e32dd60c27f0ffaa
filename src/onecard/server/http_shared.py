"""What all connections of one server share."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

from onecard.server.http_held import Held
from onecard.server.http_response import DateField
from onecard.server.http_types import HttpLimits, HttpService, Request

if TYPE_CHECKING:
    from onecard.server.http_protocol import HttpConnection

_SCRATCH_BYTES = 65_536


class Shared:
    """The service, its limits, and the connections that are open.

    Args:
        service: what the application gives.
        limits: what clients may ask.
        loop: the running loop.

    Attributes:
        allocate: the service's allocator, or the default.
        held: what is held of bodies in chunks and compressed ones.
        connections: those that are open, also such as are being closed.
        draining: whether connections are to end after the answer that they wait for.
        date: the Date field.
        is_uvloop: whether the loop is uvloop's.
        scatters: whether ``writelines`` sends buffers without joining them.
        scratch: where bytes go that nobody wants; what is in it has no meaning.
        nobody_left: set when the last connection has ended.
    """

    def __init__(self, service: HttpService, limits: HttpLimits, loop: asyncio.AbstractEventLoop) -> None:
        self.service = service
        self.limits = limits
        self.loop = loop
        self.allocate = service.allocator or fresh_memory
        self.held = Held(limits.max_held_bytes)
        self.connections: set[HttpConnection] = set()
        self.draining = False
        self.date = DateField()
        self.is_uvloop = type(loop).__module__.startswith("uvloop")
        self.scatters = self.is_uvloop or sys.version_info >= (3, 12)
        self.scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self.nobody_left = asyncio.Event()

    def leave(self, connection: HttpConnection) -> None:
        """Forget a connection that is closed."""
        self.connections.discard(connection)
        if not self.connections:
            self.nobody_left.set()


def fresh_memory(_request: Request, length: int) -> memoryview:
    """Memory of its own for a body: not zeroed, since the body fills it before anybody reads it."""
    import numpy as np

    return np.empty(length, np.uint8).data

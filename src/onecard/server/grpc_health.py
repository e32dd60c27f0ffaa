"""``grpc.health.v1.Health``: what load balancers and orchestrators ask.

Source: the gRPC Health Checking Protocol (https://github.com/grpc/grpc/blob/master/doc/health-checking.md).
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from onecard.server.grpc_calls import Calls, receive
from onecard.server.grpc_face import Caller
from onecard.server.grpc_messages import INFERENCE_SERVICE, health_messages
from onecard.server.grpc_wire import read_message
from onecard.server.http_types import HttpError
from onecard.server.oip_types import quote

if TYPE_CHECKING:
    from onecard.server.grpc_core import Rpc

_POLL_S = 0.25


class HealthMethods:
    """Answers Check and Watch. The whole server is the empty service; the inference service goes with it.

    Args:
        calls: what all RPCs share.
    """

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._request = health_messages()["HealthCheckRequest"]
        self._response = health_messages()["HealthCheckResponse"]

    async def check(self, data: bytes, _: Rpc, __: Caller) -> bytes:
        """The state of a service now."""
        service = read_message(self._request, data).service
        state = self._state(service)
        if state == "SERVICE_UNKNOWN":
            raise HttpError(404, f"there is no service {quote(service)}: expected '' or '{INFERENCE_SERVICE}'.")
        return self._told(state)

    async def watch(self, rpc: Rpc) -> None:
        """The state of a service whenever it changes; the server's end ends it."""
        self._calls.face.admit("health", Caller(rpc))
        service = read_message(self._request, await receive(rpc)).service
        last = ""
        while True:
            ending = self._calls.draining.is_set()  # before the state: what is told last is the end's
            state = self._state(service)
            if state != last:
                await rpc.write(self._told(state))
                last = state
            if ending:
                return
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._calls.draining.wait(), _POLL_S)

    def _state(self, service: str) -> str:
        if service not in ("", INFERENCE_SERVICE):
            return "SERVICE_UNKNOWN"
        return "SERVING" if self._calls.face.ready() and not self._calls.draining.is_set() else "NOT_SERVING"

    def _told(self, state: str) -> bytes:
        return self._response(status=state).SerializeToString()  # type: ignore[no-any-return]

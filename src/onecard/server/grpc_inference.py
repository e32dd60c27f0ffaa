"""ModelInfer and ModelStreamInfer: requests in, answers out.

Requests of one kind differ in their id and their tensors alone, so what was found out about their head is kept.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Coroutine, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from onecard.server.grpc_answer import encode_answer
from onecard.server.grpc_calls import Calls
from onecard.server.grpc_face import Answers, Caller
from onecard.server.grpc_infer import Plan, check_id, parse_infer, plan_infer
from onecard.server.grpc_log import OK, StreamRequest
from onecard.server.grpc_messages import inference_messages
from onecard.server.grpc_status import http_status_of, status_of
from onecard.server.grpc_wire import read_message, split_infer
from onecard.server.http_types import HttpError
from onecard.server.oip_contract import InferContract
from onecard.server.oip_types import InferRequest, ProtocolError, RegionAccess
from onecard.server.traces_grpc import traced_call

if TYPE_CHECKING:
    from onecard.server.grpc_core import Rpc
    from onecard.server.traces import RequestTrace

_UNARY, _STREAM = "ModelInfer", "ModelStreamInfer"
_NOT_TRACED = nullcontext(None)
_Task = asyncio.Task[bytes]
_T = TypeVar("_T")
_MOST_REMEMBERED = 512
_REMEMBERED_BYTES = 4096  # of a head
_UNUSUAL_BYTES = 1 << 20  # of a request that only protobuf can read, which may take 50 times that for it


class _Known:
    """A head that was seen before.

    Args:
        message: read from it.

    Attributes:
        contract: that it was checked against.
        plan: for its requests; None if each has to be read as a whole.
    """

    __slots__ = ("contract", "message", "model", "plan", "version")

    def __init__(self, message: Any) -> None:
        self.message = message
        self.model: str = message.model_name
        self.version: str = message.model_version
        self.contract: InferContract | None = None
        self.plan: Plan | None = None


class _Asked(NamedTuple):
    """A request as it was read.

    Args:
        known: what its head says.
        id: of the request.
        raw: its raw contents.
        nbytes: of all of it.
    """

    known: _Known
    id: str
    raw: Sequence[memoryview]
    nbytes: int


class InferMethods:
    """Runs requests.

    Args:
        calls: what all RPCs share.
    """

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._request = inference_messages()["ModelInferRequest"]
        self._stream_response = inference_messages()["ModelStreamInferResponse"]
        self._known: dict[bytes, _Known] = {}

    async def infer(self, data: bytes, rpc: Rpc, caller: Caller) -> bytes:
        """Answer a ``ModelInferRequest``."""
        with self._traced(_UNARY, caller, rpc.began) as trace:
            rpc.ids = _ids(trace)
            asked = self._read_request(data)
            rpc.model = asked.known.model
            return await self._run(asked, rpc, caller.address, trace=trace)

    async def stream(self, rpc: Rpc) -> None:
        """Answer requests in their order, several at once; one that fails does not end the stream."""
        caller = Caller(rpc)
        self._calls.face.admit("infer", caller)
        answers: asyncio.Queue[_Task | None] = asyncio.Queue(self._calls.limits.max_stream_requests)
        running: set[asyncio.Task[Any]] = set()
        writing = _start(_write(answers, rpc), running)
        try:
            ended = await self._read(rpc, caller, answers, running)
            await answers.put(None)
            await writing
        finally:
            for task in tuple(running):
                task.cancel()
            if running:
                await asyncio.wait(running)
        if not ended:
            raise HttpError(503, "the server is going down: this stream's last request is answered.")

    async def _read(
        self, rpc: Rpc, caller: Caller, answers: asyncio.Queue[_Task | None], running: set[asyncio.Task[Any]]
    ) -> bool:
        """Start what the client asks for; whether it ended the stream, and not the server."""
        going = _start(self._calls.draining.wait(), running)
        while not going.done():
            reading = _start(rpc.read(), running)
            await asyncio.wait((reading, going), return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                break
            data = reading.result()
            if data is None:
                return True
            await answers.put(_start(self._answer(data, rpc, caller), running))
        return False

    async def _answer(self, data: bytes, rpc: Rpc, caller: Caller) -> bytes:
        """A ``ModelStreamInferResponse``, also for a request that fails."""
        model = request_id = ""
        began, status, ids = time.monotonic(), OK, None
        try:
            with self._traced(_STREAM, caller, began) as trace:
                ids = _ids(trace)
                asked = self._read_request(data)
                model, request_id = asked.known.model, asked.id
                answer = await self._run(asked, rpc, caller.address, streamed=True, trace=trace)
        except Exception as error:
            status = http_status_of(error)
            _, text, _ = status_of(error, _STREAM)
            failed = self._stream_response(error_message=text)
            failed.infer_response.model_name, failed.infer_response.id = model, request_id
            answer = failed.SerializeToString()
        if self._calls.log is not None:
            self._calls.log.answered(rpc, status, StreamRequest(began, len(data), len(answer), model, ids))
        return answer

    def _traced(self, method: str, caller: Caller, began: float) -> AbstractContextManager[RequestTrace | None]:
        tracing = self._calls.tracing
        return _NOT_TRACED if tracing is None else traced_call(tracing, method, caller, began)

    def _read_request(self, data: bytes) -> _Asked:
        parts = split_infer(data)
        if parts is not None:
            try:
                head, request_id, raw = parts.head, parts.id.decode(), parts.raw
                known = self._known.get(head)
                if known is None:
                    known = self._learn(head)
                if not known.message.raw_input_contents:
                    return _Asked(known, request_id, raw, len(data))
            except UnicodeDecodeError:  # protobuf says so in its own words
                pass
        if len(data) > _UNUSUAL_BYTES:
            raise ProtocolError("the request cannot be read: expected a message inference.ModelInferRequest.")
        message = read_message(self._request, data)
        raw = [memoryview(each) for each in message.raw_input_contents]
        request_id = message.id
        message.ClearField("raw_input_contents")
        return _Asked(_Known(message), request_id, raw, len(data))

    def _learn(self, head: bytes) -> _Known:
        most = self._calls.limits.max_head_bytes
        if len(head) > most:
            raise ProtocolError(
                f"the request has {len(head)} bytes beside its raw contents, at most {most} are taken.",
                "Send large tensors in 'raw_input_contents'.",
            )
        known = _Known(read_message(self._request, head))
        if len(head) <= _REMEMBERED_BYTES:
            if len(self._known) >= _MOST_REMEMBERED:
                self._known.clear()
            self._known[head] = known
        return known

    async def _run(
        self, asked: _Asked, rpc: Rpc, address: str, streamed: bool = False, trace: RequestTrace | None = None
    ) -> bytes:
        calls, model = self._calls, asked.known.model
        try:
            contract, regions, request = self._understood(asked, rpc.time_remaining())
            calls.hold(asked.nbytes)
        except Exception as error:
            calls.face.refused(model, error)
            raise
        try:
            answer = self._sent(model, request, address)
            if trace is not None:
                trace.asked(answer)
            try:
                answers = await answer
            finally:
                del answer  # it holds its error, which holds this frame, and all that came with the request
            try:
                return encode_answer(model, request, answers, contract, regions, streamed)
            finally:
                answers.release()
        finally:
            calls.held_bytes -= asked.nbytes

    def _sent(self, model: str, request: InferRequest, address: str) -> Awaitable[Answers]:
        try:
            return self._calls.face.infer(model, request, client=address)
        except Exception as error:
            self._calls.face.refused(model, error)
            raise

    def _understood(
        self, asked: _Asked, remaining_s: float | None
    ) -> tuple[InferContract, RegionAccess | None, InferRequest]:
        """What a request must satisfy, the shared memory that it may speak of, and the request."""
        face = self._calls.face
        known, request_id, raw, _ = asked
        contract, _ = face.contract(known.model, known.version)
        check_id(request_id, contract)
        if known.contract is not contract:
            known.plan = plan_infer(known.message, contract)
            known.contract = contract
        if known.plan is not None:
            return contract, None, known.plan.request(request_id, raw, remaining_s)
        regions = face.region_access()
        return contract, regions, parse_infer(known.message, request_id, raw, contract, regions, remaining_s)


def _ids(trace: RequestTrace | None) -> tuple[str, str] | None:
    """What the log says of a trace; not the trace, which may hold an error and with it all frames of the request."""
    return None if trace is None else (trace.request_id, trace.trace_id)


async def _write(answers: asyncio.Queue[_Task | None], rpc: Rpc) -> None:
    """Send answers in the order of their requests."""
    while (task := await answers.get()) is not None:
        await rpc.write(await task)


def _start(awaited: Coroutine[Any, Any, _T], running: set[asyncio.Task[Any]]) -> asyncio.Task[_T]:
    task = asyncio.create_task(awaited)
    running.add(task)
    task.add_done_callback(running.discard)
    return task

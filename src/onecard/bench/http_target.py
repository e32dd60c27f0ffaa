"""A server that speaks the Open Inference Protocol over HTTP/1.1, on TCP or a Unix-domain socket.

A request is one piece of memory that is made once. It takes a connection at rest, or a new one; a connection carries
one request at a time, so that no answer stands in another's way.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast
from urllib.parse import quote

from onecard.bench.http_answers import AnswerReader, HttpAnswer, MalformedAnswerError
from onecard.bench.metadata import datatype_name, protocol_spec
from onecard.bench.records import ANSWERED, FAILED, REFUSED
from onecard.bench.target import Address, Done, Inputs, raw_bytes
from onecard.errors import EngineError, UsageError
from onecard.spec import Spec

_OK, _UNAUTHORIZED, _FORBIDDEN, _NOT_FOUND = 200, 401, 403, 404
_REFUSALS = (429, 503)
_LONGEST_WORDS = 300
_PATIENCE_S = 10.0  # for an answer that is no inference


@dataclass
class _Pool:
    """The connections that are open, and those of them that have no request under way."""

    open: set[_Connection] = field(default_factory=set)
    rest: list[_Connection] = field(default_factory=list)


class _Connection(asyncio.Protocol):
    """One connection: a request at a time."""

    def __init__(self, pool: _Pool, keep: bool = False) -> None:
        self._pool = pool
        self._reader = AnswerReader(keep)
        self._done: Any = None
        self.open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.open = True
        self._pool.open.add(self)

    def send(self, wire: bytes, done: Any) -> None:
        """Send a request; ``done`` gets the answer, or what went wrong as text, and when."""
        self._done = done
        self.transport.write(wire)

    def data_received(self, data: bytes) -> None:
        when = time.perf_counter()
        try:
            answer = self._reader.feed(data)
        except MalformedAnswerError:
            self._end("malformed answer", when)
            self.open = False
            self.transport.abort()
            return
        if answer is None:
            return
        if answer.closes:
            self.open = False
            self.transport.close()
        else:
            self._pool.rest.append(self)
        self._end(answer, when)

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        self._pool.open.discard(self)
        self._end("connection lost", time.perf_counter())

    def _end(self, answer: HttpAnswer | str, when: float) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(answer, when)


class HttpTarget:
    """See :func:`open_http`."""

    def __init__(self, address: Address, fields: Sequence[str], context: ssl.SSLContext | None) -> None:
        self._address = address
        self._fields = tuple(fields)
        self._context = context
        self._pool = _Pool()
        self._connecting: set[asyncio.Task[None]] = set()
        self.model = address.model
        self.spec = Spec(())
        self.about: dict[str, str] = {}
        self.said = ""

    def prepare(self, inputs: Inputs) -> bytes:
        raw = raw_bytes(inputs)
        items = [
            {
                "name": t.name,
                "datatype": datatype_name(t.dtype),
                "shape": list(inputs[t.name].shape),
                "parameters": {"binary_data_size": len(raw[t.name])},
            }
            for t in self.spec.inputs
        ]
        text = json.dumps({"parameters": {"binary_data_output": True}, "inputs": items}, separators=(",", ":")).encode()
        head = f"Inference-Header-Content-Length: {len(text)}"
        body = b"".join((text, *(raw[t.name] for t in self.spec.inputs)))
        return self._wire("POST", f"/v2/models/{quote(self.model, safe='')}/infer", body, (head,))

    def send(self, request: bytes, done: Done) -> None:
        finish = partial(self._finish, done)
        while self._pool.rest:
            connection = self._pool.rest.pop()
            if connection.open:
                connection.send(request, finish)
                return
        task = asyncio.get_running_loop().create_task(self._send_on_new(request, finish))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def close(self) -> None:
        for task in list(self._connecting):
            task.cancel()
        await asyncio.gather(*self._connecting, return_exceptions=True)
        for connection in list(self._pool.open):
            connection.transport.abort()
        await asyncio.sleep(0)

    async def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, Any]:
        """Ask something else than an inference.

        Returns:
            The status, and the JSON of the body (None where it is none).

        Raises:
            EngineError: the server cannot be reached or does not answer.
        """
        answered: asyncio.Future[HttpAnswer | str] = asyncio.get_running_loop().create_future()
        try:
            connection = await asyncio.wait_for(self._connect(_Pool(), keep=True), _PATIENCE_S)
            connection.send(self._wire(method, path, body), lambda answer, _: answered.set_result(answer))
            answer = await asyncio.wait_for(answered, _PATIENCE_S)
            connection.transport.close()
        except (OSError, asyncio.TimeoutError) as error:
            raise self._unreachable(str(error) or f"no answer within {_PATIENCE_S:.0f} s") from error
        if isinstance(answer, str):
            raise self._unreachable(answer)
        try:
            return answer.status, json.loads(answer.body) if answer.body else None
        except ValueError:
            return answer.status, None

    def _finish(self, done: Done, answer: HttpAnswer | str, when: float) -> None:
        if isinstance(answer, str):
            self.said = self.said or answer
            done(FAILED + answer, when)
        elif answer.status == _OK:
            done(ANSWERED, when)
        else:
            self.said = self.said or _words(answer.body)
            done(f"{REFUSED if answer.status in _REFUSALS else FAILED}HTTP {answer.status}", when)

    async def _send_on_new(self, request: bytes, done: Any) -> None:
        try:
            connection = await self._connect(self._pool)
        except OSError as error:
            done(f"no connection ({error.strerror or type(error).__name__})", time.perf_counter())
            return
        connection.send(request, done)

    async def _connect(self, pool: _Pool, keep: bool = False) -> _Connection:
        loop, where = asyncio.get_running_loop(), self._address
        if where.socket:
            _, made = await loop.create_unix_connection(lambda: _Connection(pool, keep), where.socket)
        else:
            _, made = await loop.create_connection(
                lambda: _Connection(pool, keep), where.host, where.port, ssl=self._context
            )
        return made

    def _wire(self, method: str, path: str, body: bytes, fields: Sequence[str] = ()) -> bytes:
        host = self._address.host or "localhost"
        host = f"[{host}]" if ":" in host else host
        named = f"{host}:{self._address.port}" if self._address.port else host
        lines = (f"{method} {path} HTTP/1.1", f"Host: {named}", f"Content-Length: {len(body)}", *fields, *self._fields)
        return "\r\n".join((*lines, "", "")).encode("latin-1") + body

    def _unreachable(self, why: str) -> EngineError:
        return EngineError(
            f"the server at {self._address.text} cannot be reached: {why}.", "Is it running, and is it ready?"
        )


async def open_http(address: Address, fields: Sequence[str] = (), ca: str | None = None) -> HttpTarget:
    """Reach a server and learn what its model takes.

    Args:
        address: of the server, and the model if it has several.
        fields: further header fields, such as ``Authorization: Bearer ...``.
        ca: a PEM file of authorities to trust, instead of the system's (TLS).

    Raises:
        EngineError: it cannot be reached.
        UsageError: it has no such model, or several and none is named; or it asks for a token.
    """
    target = HttpTarget(address, _checked(fields), ssl.create_default_context(cafile=ca) if address.tls else None)
    try:
        await _learn(target, address)
    except BaseException:
        await target.close()
        raise
    return target


async def _learn(target: HttpTarget, address: Address) -> None:
    status, server = await target.ask("GET", "/v2")
    _check_rights(status, address)
    if not target.model:
        target.model = _only(await _names(target), address)
    status, found = await target.ask("GET", f"/v2/models/{quote(target.model, safe='')}")
    _check_rights(status, address)
    if status != _OK or not isinstance(found, Mapping):
        names = await _names(target) if status == _NOT_FOUND else []
        said = found.get("error", "") if isinstance(found, Mapping) else ""
        raise UsageError(
            f"the server at {address.text} does not serve '{target.model}': HTTP {status} {said}".strip(),
            f"It has: {', '.join(names)}." if names else "Name another with --model.",
        )
    target.spec = protocol_spec([(t["name"], t["datatype"], t["shape"]) for t in found.get("inputs", [])])
    server = server if isinstance(server, Mapping) else {}
    versions = [str(each) for each in found.get("versions") or []]
    target.about = {
        "protocol": "HTTP/1.1, binary tensor data",
        "server": f"{server.get('name', 'unknown')} {server.get('version', '')}".strip(),
        "model": target.model,
        **({"model version": ", ".join(versions)} if versions else {}),
    }


async def _names(target: HttpTarget) -> list[str]:
    """Models that can be asked, by the index; empty where there is none."""
    status, found = await target.ask("POST", "/v2/repository/index", b"{}")
    entries = found if status == _OK and isinstance(found, list) else []
    return sorted({each["name"] for each in entries if each.get("state", "READY") in ("READY", "")})


def _words(body: bytes) -> str:
    """What an error's body says."""
    try:
        found = json.loads(body)
    except ValueError:
        found = body.decode("utf-8", "replace")
    text = str(found.get("error", "")) if isinstance(found, Mapping) else str(found)
    return text[:_LONGEST_WORDS]


def _only(names: Sequence[str], address: Address) -> str:
    if len(names) != 1:
        there = f"it has: {', '.join(names)}" if names else "it does not say which it has"
        raise UsageError(f"which model of {address.text}? {there}.", "Name it with --model.")
    return names[0]


def _check_rights(status: int, address: Address) -> None:
    if status in (_UNAUTHORIZED, _FORBIDDEN):
        raise UsageError(
            f"the server at {address.text} asks for a token (HTTP {status}).",
            "Pass it with --header 'Authorization: Bearer TOKEN'.",
        )


def _checked(fields: Sequence[str]) -> Sequence[str]:
    for line in fields:
        name, colon, value = line.partition(":")
        if not (colon and name.strip() == name and name) or any(c in line for c in "\r\n\0") or not value.isascii():
            raise UsageError(f"cannot read --header '{line}':", "write it like 'Name: value'.")
    return fields

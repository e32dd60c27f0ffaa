"""Listening: TCP and Unix-domain sockets, TLS, several processes on one port, and an end that drops nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onecard.errors import UsageError
from onecard.server.http_protocol import HttpConnection
from onecard.server.http_shared import Shared
from onecard.server.http_types import LOGGER, HttpLimits, HttpService

_BACKLOG = 2048
_SHORTEST_CHECK_S, _LONGEST_CHECK_S = 0.02, 0.5
_DRAIN_IDLE_S = 1.0  # how long a connection at rest may still bring a request once draining began


@dataclass(frozen=True)
class Listen:
    """Where to listen: TCP, a Unix-domain socket, or both.

    Args:
        host: an address or name; None for no TCP.
        port: 0 for one that is free.
        uds: path of the Unix-domain socket; None for none. A socket that nobody listens on any more is replaced.
        uds_mode: who may connect to it: its permission bits.
        tls: the context for TCP; the Unix-domain socket goes without.
        reuse_port: whether other processes may listen on the same port, with connections spread over them.
        shared: a Unix-domain socket that another process listens on, to accept from as well; it is that one's to
            remove.
    """

    host: str | None = "127.0.0.1"
    port: int = 8000
    uds: Path | None = None
    uds_mode: int = 0o600
    tls: ssl.SSLContext | None = None
    reuse_port: bool = False
    shared: socket.socket | None = None


class HttpServer:
    """A server that listens; made by ``serve_http``.

    Args:
        shared: what its connections share.
    """

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._servers: list[asyncio.AbstractServer] = []
        self._uds: tuple[Path, int] | None = None  # its path and inode
        limits = shared.limits
        shortest = min(limits.head_timeout_s, limits.body_timeout_s, limits.idle_timeout_s, limits.write_timeout_s,
                       limits.linger_s)  # fmt: skip
        self._check_s = min(max(shortest / 4, _SHORTEST_CHECK_S), _LONGEST_CHECK_S)
        self._timer = shared.loop.call_later(self._check_s, self._check)

    @property
    def sockets(self) -> list[socket.socket]:
        return [listening for server in self._servers for listening in server.sockets]  # type: ignore[attr-defined]

    @property
    def port(self) -> int | None:
        """The TCP port; None without TCP."""
        for listening in self.sockets:
            if listening.family != socket.AF_UNIX:
                return int(listening.getsockname()[1])
        return None

    @property
    def connections(self) -> int:
        return len(self._shared.connections)

    def _check(self) -> None:
        self._timer = self._shared.loop.call_later(self._check_s, self._check)
        now = self._shared.loop.time()
        for connection in tuple(self._shared.connections):
            try:
                connection.check(now)
            except Exception:  # the others' time goes on
                LOGGER.exception("A connection could not be checked; it is cut.")
                connection.abort()

    async def listen(self, where: Listen) -> None:
        """Begin to listen.

        Raises:
            UsageError: an address that cannot be had, or none is given.
        """
        shared = self._shared
        wait_s = shared.limits.head_timeout_s
        if where.host is None and where.uds is None:
            raise UsageError("There is neither a host nor a Unix-domain socket to listen on.", "Give one of them.")
        try:
            if where.host is not None:
                handshake = {} if where.tls is None else {"ssl": where.tls, "ssl_handshake_timeout": wait_s}
                server = await shared.loop.create_server(
                    lambda: HttpConnection(shared), where.host, where.port,
                    backlog=_BACKLOG, reuse_port=where.reuse_port, **handshake,
                )  # type: ignore[call-overload]  # fmt: skip
                self._servers.append(server)
            if where.uds is not None:
                listening = _unix_socket(where.uds, where.uds_mode)
                self._uds = (where.uds, os.stat(where.uds).st_ino)
                await self._accept(listening)
            if where.shared is not None:
                await self._accept(where.shared)
        except OSError as error:
            tcp = None if where.host is None else f"{where.host}:{where.port}"
            place = " and ".join(str(part) for part in (tcp, where.uds) if part is not None)
            raise UsageError(f"Listening on {place} is not possible: {error}.", "Choose another address.") from error

    async def _accept(self, listening: socket.socket) -> None:
        """Take connections of a Unix-domain socket."""
        shared = self._shared
        # asyncio removes the socket's path when it stops, which is for whoever made it.
        keep: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) and not shared.is_uvloop else {}
        server = await shared.loop.create_unix_server(
            lambda: HttpConnection(shared), sock=listening, backlog=_BACKLOG, **keep
        )
        self._servers.append(server)

    async def close(self, drain_s: float = 0.0) -> None:
        """Stop listening, let what was asked be answered, and close.

        Connections end with the answer that they wait for, which says so. One at rest is closed after a second (or half
        of ``drain_s``): a client that had just sent something when the end began is still answered.

        Args:
            drain_s: how long that may take; then connections are cut.
        """
        shared = self._shared
        shared.draining = True
        for server in self._servers:
            server.close()
        self._remove_uds()
        began = shared.loop.time()
        idle_until, until = began + min(_DRAIN_IDLE_S, drain_s / 2), began + drain_s
        while shared.connections and (now := shared.loop.time()) < until:
            if now >= idle_until:
                for connection in tuple(shared.connections):
                    connection.drain()
            wait_s = min(self._check_s, max(idle_until - now, _SHORTEST_CHECK_S), until - now)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(shared.nobody_left.wait(), wait_s)
        for connection in tuple(shared.connections):
            connection.abort()
        while shared.connections:
            await shared.nobody_left.wait()
        self._timer.cancel()

    def _remove_uds(self) -> None:
        if self._uds is None:
            return
        path, inode = self._uds
        self._uds = None
        with contextlib.suppress(OSError):
            if os.stat(path).st_ino == inode:  # not one that a new server has put there
                path.unlink()


def _unix_socket(path: Path, mode: int) -> socket.socket:
    """Bind a Unix-domain socket. Nobody can connect before it listens, and then its mode is set."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise FileExistsError(f"{path} is there and is no socket")
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
            else:
                raise FileExistsError(f"another process listens on {path}")
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(str(path))
        os.chmod(path, mode)
    except OSError:
        listening.close()
        raise
    return listening


async def serve_http(service: HttpService, where: Listen, limits: HttpLimits | None = None) -> HttpServer:
    """Serve on the running loop; uvloop's is the fast one, any other works.

    Args:
        service: handler, allocator and admission.
        where: the addresses.
        limits: what clients may ask; None for the defaults.

    Returns:
        The server, listening.

    Raises:
        UsageError: an address that cannot be had.
    """
    server = HttpServer(Shared(service, limits or HttpLimits(), asyncio.get_running_loop()))
    try:
        await server.listen(where)
    except BaseException:
        await server.close()
        raise
    return server

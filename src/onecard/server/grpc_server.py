"""Listening for gRPC on the running event loop: TCP and Unix-domain sockets, TLS, and an end that drops nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onecard.errors import MissingDependencyError, UsageError
from onecard.server.grpc_calls import Calls, Handler
from onecard.server.grpc_face import Inference
from onecard.server.grpc_health import HealthMethods
from onecard.server.grpc_inference import InferMethods
from onecard.server.grpc_limits import GrpcLimits, GrpcListen, channel_options
from onecard.server.grpc_log import RpcLog
from onecard.server.grpc_messages import HEALTH_SERVICE, INFERENCE_SERVICE
from onecard.server.grpc_methods import ServiceMethods
from onecard.server.http_tls import tls_context

if TYPE_CHECKING:
    from onecard.server.grpc_core import Rpc
    from onecard.server.logs import AccessLog
    from onecard.server.traces import Tracing


class GrpcServer:
    """A server that listens; made by ``serve_grpc``.

    Args:
        calls: its RPCs.
        listen: where.

    Attributes:
        port: the TCP port; None without TCP.
    """

    def __init__(self, calls: Calls, listen: GrpcListen) -> None:
        from onecard.server.grpc_core import Core

        loop = asyncio.get_running_loop()
        self._calls = calls
        self._core = Core(self._begin, channel_options(calls.limits, listen), loop)
        self._uds: tuple[Path, int] | None = None  # its path and inode
        self._timer: asyncio.TimerHandle | None = None
        self._where = listen
        self.port: int | None = None

    @property
    def open_rpcs(self) -> int:
        return len(self._core.open)

    def listen(self) -> None:
        """Bind the addresses, and serve.

        Raises:
            UsageError: an address that cannot be had, or none is given, or TLS files that cannot be used.
        """
        where = self._where
        if where.host is None and where.uds is None:
            raise UsageError("There is neither a host nor a Unix-domain socket to listen on.", "Give one of them.")
        if where.host is not None:
            host = f"[{where.host}]" if ":" in where.host else where.host
            self.port = self._bind(f"{host}:{where.port}", _credentials(where))
        if where.uds is not None:
            self._bind_uds(where.uds, where.uds_mode)
        self._core.start_serving()
        self._check()

    def _bind(self, address: str, credentials: Any = None) -> int:
        try:
            port = self._core.listen(address, credentials)
        except RuntimeError:
            port = 0
        if not port:
            raise UsageError(
                f"Listening for gRPC on {address} is not possible: it is taken, or not this machine's.",
                "Choose another address.",
            )
        return port

    def _bind_uds(self, path: Path, mode: int) -> None:
        try:
            _make_room(path)
            mask = os.umask(0o777 & ~mode)  # nobody else may connect between its making and a chmod
            try:
                self._bind(f"unix:{path}")
            finally:
                os.umask(mask)
            self._uds = (path, path.stat().st_ino)
        except OSError as error:
            raise UsageError(
                f"Listening for gRPC on {path} is not possible: {error}.", "Choose another path."
            ) from error

    def _begin(self, rpc: Rpc) -> None:
        self._calls.begin(rpc, len(self._core.open))

    def _check(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._calls.check_s, self._check)
        self._calls.check(tuple(self._core.open))

    async def close(self, drain_s: float = 0.0) -> None:
        """Stop listening, let what was asked be answered, and close.

        Streams end with the answer to what they had asked; health watchers are told first.

        Args:
            drain_s: how long that may take; then RPCs are cut.
        """
        self._calls.draining.set()
        await self._core.close(drain_s)
        if self._timer is not None:
            self._timer.cancel()
        if self._uds is not None:
            path, inode = self._uds
            with contextlib.suppress(OSError):
                if path.stat().st_ino == inode:  # not one that a new server has put there
                    path.unlink()


async def serve_grpc(
    face: Inference,
    listen: GrpcListen,
    limits: GrpcLimits | None = None,
    tracing: Tracing | None = None,
    access_log: AccessLog | None = None,
) -> GrpcServer:
    """Serve the inference and the health service on the running loop.

    Args:
        face: the server behind it.
        listen: the addresses.
        limits: what clients may ask; None for the defaults.
        tracing: begins traces of inference; None for none.
        access_log: where RPCs are written; None for nowhere.

    Returns:
        The server, listening.

    Raises:
        UsageError: an address that cannot be had.
        MissingDependencyError: grpcio or protobuf is not installed.
    """
    # It complains of every process that is started, and of every header field that it cannot read, some with a
    # traceback: any client could fill the log.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    logging.getLogger("grpc._cython.cygrpc").setLevel(logging.CRITICAL)
    try:
        calls = Calls(face, limits or GrpcLimits(), tracing, None if access_log is None else RpcLog(access_log))
        calls.handlers.update(_handlers(calls))
        server = GrpcServer(calls, listen)
    except ImportError as error:
        raise MissingDependencyError(f"gRPC needs {error.name}.", "pip install 'onecard[serve]'") from error
    try:
        server.listen()
    except BaseException:
        await server.close()
        raise
    return server


def _handlers(calls: Calls) -> dict[str, Handler]:
    infer, health = InferMethods(calls), HealthMethods(calls)
    inference = {
        **ServiceMethods(calls).handlers(),
        "ModelInfer": calls.unary("infer", infer.infer),
        "ModelStreamInfer": infer.stream,
    }
    checks = {"Check": calls.unary("health", health.check), "Watch": health.watch}
    return {
        **{f"/{INFERENCE_SERVICE}/{name}": handler for name, handler in inference.items()},
        **{f"/{HEALTH_SERVICE}/{name}": handler for name, handler in checks.items()},
    }


def _credentials(where: GrpcListen) -> Any:
    """The server's credentials as grpcio has them; None without TLS.

    Raises:
        UsageError: a file is missing, or does not hold what it should.
    """
    if where.certificate is None:
        return None
    import grpc

    tls_context(where.certificate, where.key, where.client_ca)  # says what is wrong; grpcio would only log it
    certificate, key = where.certificate.read_bytes(), (where.key or where.certificate).read_bytes()
    roots = where.client_ca.read_bytes() if where.client_ca is not None else None
    return grpc.ssl_server_credentials([(key, certificate)], roots, require_client_auth=roots is not None)


def _make_room(path: Path) -> None:
    """Remove a socket that nobody listens on; grpcio would remove any.

    Raises:
        OSError: something else is there, or somebody listens.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise FileExistsError(f"{path} is there and is no socket")
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
            else:
                raise FileExistsError(f"another process listens on {path}")

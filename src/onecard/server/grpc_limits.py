"""What the gRPC front lets its clients do, in onecard's words and in grpcio's, and where it listens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class GrpcListen:
    """Where to listen: TCP, a Unix-domain socket, or both.

    Args:
        host: an address or name; None for no TCP.
        port: 0 for one that is free.
        uds: path of the Unix-domain socket; None for none. A socket that nobody listens on any more is replaced.
        uds_mode: who may connect to it: its permission bits.
        certificate: a PEM file with the certificate and those between it and the root, for TLS on TCP; None for none.
        key: a PEM file with its key, without password; None if it stands in the same file.
        client_ca: a PEM file with the authorities that sign clients' certificates; with it, a client without one is
            refused.
        reuse_port: whether other processes may listen on the same port, with connections spread over them.
    """

    host: str | None = "127.0.0.1"
    port: int = 8001
    uds: Path | None = None
    uds_mode: int = 0o600
    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None
    reuse_port: bool = False


@dataclass(frozen=True)
class GrpcLimits:
    """What one connection, and all of them together, may ask of the server.

    Args:
        max_message_bytes: of a request (RESOURCE_EXHAUSTED beyond it).
        max_head_bytes: of a request beside its raw contents (INVALID_ARGUMENT).
        max_held_bytes: of all requests that are being answered (UNAVAILABLE).
        max_metadata_bytes: of an RPC's metadata (RESOURCE_EXHAUSTED).
        max_rpcs: open at once, those included that are still being received (RESOURCE_EXHAUSTED).
        max_rpcs_per_connection: open at once; gRPC's clients keep further ones back. One that uses all of them may see
            single RPCs refused (UNAVAILABLE), while the core still counts those that have just ended.
        max_connections: open connections; further ones are closed.
        max_stream_requests: requests of one ModelStreamInfer that are under way; beyond it, reading pauses.
        receive_timeout_s: from an RPC's beginning to the end of its request (DEADLINE_EXCEEDED).
        idle_timeout_s: how long a connection may stay open without an RPC.
        ping_interval_s: how often a client may ping without sending anything else; who does so oftener is sent away.
        keepalive_s: how often the server asks a silent connection whether somebody is there.
        keepalive_timeout_s: how long it waits for the answer.
    """

    max_message_bytes: int = 64 << 20
    max_head_bytes: int = 8 << 20
    max_held_bytes: int = 4 << 30
    max_metadata_bytes: int = 16_384
    max_rpcs: int = 2000
    max_rpcs_per_connection: int = 1000
    max_connections: int = 1000
    max_stream_requests: int = 16
    receive_timeout_s: float = 60.0
    idle_timeout_s: float = 300.0
    ping_interval_s: float = 10.0
    keepalive_s: float = 60.0
    keepalive_timeout_s: float = 20.0


def channel_options(limits: GrpcLimits, listen: GrpcListen) -> list[tuple[str, int]]:
    """The limits as grpcio's channel arguments (``grpc/impl/channel_arg_names.h``)."""
    return [
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", limits.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", limits.max_metadata_bytes),
        ("grpc.max_concurrent_streams", limits.max_rpcs_per_connection),
        ("grpc.max_allowed_incoming_connections", limits.max_connections),
        ("grpc.max_connection_idle_ms", _ms(limits.idle_timeout_s)),
        ("grpc.http2.min_ping_interval_without_data_ms", _ms(limits.ping_interval_s)),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", _ms(limits.ping_interval_s)),
        ("grpc.http2.max_ping_strikes", 2),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", _ms(limits.keepalive_s)),
        ("grpc.keepalive_timeout_ms", _ms(limits.keepalive_timeout_s)),
        ("grpc.so_reuseport", int(listen.reuse_port)),
    ]


def _ms(seconds: float) -> int:
    return max(int(seconds * 1000), 1)

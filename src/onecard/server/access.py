"""Who may call what: bearer tokens for inference and for control, and what is open without one.

Health (live, ready) is open to everybody, always: it is asked by load balancers and orchestrators, which have no token,
and tells nothing but yes or no. Metadata, statistics and inference are one right; control (loading, unloading,
reloading models, shared memory) is another, which holds the first.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeAlias

from onecard.errors import UsageError
from onecard.server.http_types import HttpError

Kind: TypeAlias = Literal["infer", "control", "health"]

MIN_TOKEN_CHARACTERS = 16
MAX_TOKEN_CHARACTERS = 4096
_CURE = "Make one: (umask 077; openssl rand -hex 32 > FILE)."
_ASK = ((b"WWW-Authenticate", b'Bearer realm="onecard"'),)
_SCHEME = b"bearer"
# What a proxy adds to a request that it passes on, and a browser to one that a page of another site sends.
_FROM_ELSEWHERE = (b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via", b"origin")


class Access:
    """Checks requests against the tokens. Holds their digests alone, so that no log or traceback can show them.

    Args:
        infer_token: asked of inference, metadata and statistics; None: these are open.
        control_token: asked of control, and good for everything else; None: only peers on this machine may control,
            with the inference token if there is one.
    """

    __slots__ = ("_control", "_infer")

    def __init__(self, infer_token: bytes | None, control_token: bytes | None) -> None:
        self._infer = None if infer_token is None else _digest(infer_token)
        self._control = None if control_token is None else _digest(control_token)

    @property
    def digests(self) -> tuple[bytes | None, bytes | None]:
        """Of the tokens, for :meth:`of_digests` in another process of the server."""
        return self._infer, self._control

    @classmethod
    def of_digests(cls, digests: tuple[bytes | None, bytes | None]) -> Access:
        """The same rights, from :attr:`digests`."""
        access = cls(None, None)
        access._infer, access._control = digests
        return access

    def check(self, kind: Kind, headers: Mapping[bytes, bytes], peer: str, trusted: bool) -> None:
        """Let a request pass, or refuse it.

        Args:
            kind: what it asks for.
            headers: its header fields, names in lower case.
            peer: the address that it came from, as the socket has it. A name that is no address is from elsewhere.
            trusted: whether its listener vouches that it came from this machine: one on a Unix-domain socket. This must
                be known from the listening socket; a peer's address may be missing for other reasons.

        Raises:
            HttpError: 401, no token or a wrong one; 403, control from elsewhere where there is no token for it.
        """
        if kind == "health":
            return
        if kind == "control":
            if self._control is not None:
                _require(headers, "control", self._control)
                return
            if not _is_local(headers, peer, trusted):
                raise HttpError(
                    403,
                    "models are controlled from the server's own machine only: for calls from elsewhere, start the "
                    "server with a control token.",
                )
        if self._infer is not None:
            _require(headers, "inference", self._infer, self._control or self._infer)


def read_token(path: Path) -> bytes:
    """The token that a file holds, without white space around it.

    Args:
        path: a regular file that nobody but its owner may read or write.

    Raises:
        UsageError: it cannot be read, others may read it, or what it holds is no token.
    """
    data = _read_private(path)
    token = data.strip()
    if not token:
        raise UsageError(f"{path} is empty, expected a token.", _CURE)
    if len(token) > MAX_TOKEN_CHARACTERS:
        raise UsageError(f"{path} holds more than the {MAX_TOKEN_CHARACTERS} characters that a token may have.", _CURE)
    if any(not 0x21 <= byte <= 0x7E for byte in token):  # noqa: PLR2004 - the printable ASCII characters
        raise UsageError(f"{path} must hold one token of printable ASCII characters, without white space.", _CURE)
    if len(token) < MIN_TOKEN_CHARACTERS:
        raise UsageError(
            f"{path} holds a token of {len(token)} characters, expected {MIN_TOKEN_CHARACTERS} or more.", _CURE
        )
    return token


def _read_private(path: Path) -> bytes:
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise UsageError(f"{path} is not a regular file, expected one with a token.", _CURE)
            if found.st_mode & 0o077:
                raise UsageError(
                    f"{path} has the mode {stat.S_IMODE(found.st_mode):04o}: others may get at the token.",
                    f"Take it from them: chmod 600 {path}.",
                )
            return file.read(2 * MAX_TOKEN_CHARACTERS)
    except OSError as error:
        raise UsageError(f"the token in {path} cannot be read: {error.strerror or error}.", _CURE) from error


def _open_at_once(path: str, flags: int) -> int:
    """Without waiting for somebody to write, which opening a pipe does."""
    return os.open(path, flags | os.O_NONBLOCK)


def _digest(token: bytes) -> bytes:
    """Of equal length for every token, so that comparing two takes the same time whatever they are."""
    return hashlib.sha256(token).digest()


def _require(headers: Mapping[bytes, bytes], what: str, *expected: bytes) -> None:
    """401 unless one of the tokens came with the request."""
    value = headers.get(b"authorization")
    if value is None:
        raise HttpError(401, f"this needs the {what} token: send 'Authorization: Bearer TOKEN'.", _ASK)
    scheme, _, token = value.partition(b" ")
    given = _digest(token.strip(b" "))
    right = False
    for each in expected:  # all of them: which one fits is not told by the time it takes
        right |= hmac.compare_digest(given, each)
    if not right or scheme.lower() != _SCHEME:
        raise HttpError(401, f"this needs the {what} token: what came in 'Authorization' is not it.", _ASK)


def _is_local(headers: Mapping[bytes, bytes], peer: str, trusted: bool) -> bool:
    """Whether a request was made on this machine, as far as that can be told: not one passed on from elsewhere."""
    if any(name in headers for name in _FROM_ELSEWHERE):
        return False
    return trusted or _is_loopback(peer)


def _is_loopback(peer: str) -> bool:
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)  # as a socket for both IPv4 and IPv6 has it: ::ffff:127.0.0.1
    return bool((mapped or address).is_loopback)

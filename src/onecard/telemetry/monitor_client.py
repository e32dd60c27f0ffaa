"""Asks a running server how it is, with the standard library alone."""

from __future__ import annotations

import http.client
import json
import ssl
from pathlib import Path
from urllib.parse import urlsplit

from onecard.errors import OnecardError, UsageError
from onecard.telemetry.snapshot import Snapshot, decode

STATE_PATH = "/v2/onecard/state"
_MAX_BYTES = 64 << 20
_OK, _UNAUTHORIZED, _FORBIDDEN, _NOT_FOUND = 200, 401, 403, 404


class UnreachableError(OnecardError):
    """No server answers there; it may come back."""

    exit_code = 7
    http_status = 503


class StateClient:
    """One server's state.

    Args:
        url: of the server: ``http://127.0.0.1:8000``, ``https://name/prefix``, or ``name:port`` for the former.
        token: that the server asks for, if it does.
        authority: a PEM file with the certificate that signed the server's, for HTTPS.
        limit_s: for connecting, and again for each part of the answer.

    Attributes:
        url: with its scheme, without a slash at its end.

    Raises:
        UsageError: the URL or the file cannot be used.
    """

    def __init__(self, url: str, token: str = "", authority: Path | None = None, limit_s: float = 5.0) -> None:
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        self._headers = {"Accept": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
        self._limit_s = limit_s
        try:
            parts = urlsplit(self.url)
            self._host, self._port = parts.hostname, parts.port
        except ValueError as error:
            raise UsageError(f"cannot read the address '{url}': {error}.", _HOW) from None
        if parts.scheme not in ("http", "https") or not self._host or parts.query or parts.fragment:
            raise UsageError(f"cannot read the address '{url}'.", _HOW)
        self._path = parts.path.rstrip("/") + STATE_PATH
        self._tls = _tls(authority) if parts.scheme == "https" else None

    def ask(self) -> bytes:
        """The state as the server sends it.

        Raises:
            UnreachableError: nobody answers, or not in time.
            UsageError: the server refuses; the message is its own.
        """
        try:
            status, body = self._get()
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise UnreachableError(
                f"no server answers at {self.url}: {reason}.", "Is 'onecard serve' running there, on this port?"
            ) from error
        if status != _OK:
            raise _refusal(self.url, status, body)
        return body

    def snapshot(self) -> Snapshot:
        """The state, read.

        Raises:
            UnreachableError: nobody answers, or not in time.
            UsageError: the server refuses; the message is its own.
            DataError: it answers something else.
        """
        return decode(self.ask())

    def _get(self) -> tuple[int, bytes]:
        assert self._host is not None  # checked when it was made
        if self._tls is None:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=self._limit_s)
        else:
            connection = http.client.HTTPSConnection(self._host, self._port, timeout=self._limit_s, context=self._tls)
        try:
            connection.request("GET", self._path, headers=self._headers)
            with connection.getresponse() as response:
                return response.status, response.read(_MAX_BYTES)
        finally:
            connection.close()


_HOW = "Write it like http://127.0.0.1:8000."


def _tls(authority: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=authority)
    except OSError as error:  # an SSLError is one
        raise UsageError(f"the certificate {authority} cannot be read: {error}.", "Name a PEM file.") from error


def _refusal(url: str, status: int, body: bytes) -> UsageError:
    try:
        said = str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        said = body[:200].decode("utf-8", "replace")
    if status == _NOT_FOUND:
        return UsageError(f"{url} has no {STATE_PATH}: {said}", "Is it the HTTP port of an 'onecard serve'?")
    cure = "Name the file with its token: --auth-token-file FILE." if status in (_UNAUTHORIZED, _FORBIDDEN) else ""
    return UsageError(f"{url} refuses to tell how it is ({status}): {said}", cure)

"""What load is put on: the one face of a server over HTTP or gRPC, and of a bundle in this process."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import unquote, urlsplit

import numpy as np
import numpy.typing as npt

from onecard.errors import UsageError
from onecard.spec import Spec

Inputs = dict[str, npt.NDArray[Any]]
Done = Callable[[str, float], None]
"""Told how a request ended (see :mod:`onecard.bench.records`), and when, by ``time.perf_counter``."""
Kind = Literal["http", "grpc", "bundle"]
_PORTS = {"http": 80, "https": 443}
_EXPECTED = "expected http://host:port/model, grpc://host:port, unix:PATH or a bundle's folder"


class Target(Protocol):
    """Answers requests. All methods are called on the event loop's thread."""

    spec: Spec
    """The model's inputs; a dimension of any size is a symbol."""
    about: dict[str, str]
    """What it says of itself: the server's name and version, the model's version."""
    said: str
    """Its words about the first request that it did not answer; empty before there was one."""

    def prepare(self, inputs: Inputs) -> Any:
        """Make a request ready to be sent many times."""
        ...

    def send(self, request: Any, done: Done) -> None:
        """Send a request and return at once. ``done`` is called on the loop's thread, once, and never from in here."""
        ...

    async def close(self) -> None:
        """Give everything up, also requests that are under way."""
        ...


@dataclass(frozen=True)
class Address:
    """Where a target is.

    Args:
        kind: how to talk to it.
        text: as it was given.
        host: name or number of the machine, without brackets.
        port: of TCP.
        socket: path of a Unix-domain socket; empty for TCP.
        model: the name, or empty for the only one that is there.
        folder: of a bundle.
        tls: whether the connection is encrypted.
    """

    kind: Kind
    text: str
    host: str = ""
    port: int = 0
    socket: str = ""
    model: str = ""
    folder: Path = Path()
    tls: bool = False


def parse_address(text: str, model: str = "") -> Address:
    """Read what the user named.

    Args:
        text: a URL, ``unix:PATH`` or a folder.
        model: its name, where the URL does not say it.

    Raises:
        UsageError: it is none of these, or names two models.
    """
    if text.startswith("unix:"):
        return Address("http", text, socket=text.removeprefix("unix:"), model=model)
    if "://" not in text:
        if not Path(text).is_dir():
            raise UsageError(f"there is no folder {text}: {_EXPECTED}.")
        return Address("bundle", text, folder=Path(text), model=model)
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise UsageError(f"cannot read the address '{text}': {error}.", f"{_EXPECTED.capitalize()}.") from None
    if parts.scheme not in ("http", "https", "grpc") or not host:
        raise UsageError(f"cannot read the address '{text}': {_EXPECTED}.")
    named = _model_of(parts.path, text)
    if named and model and named != model:
        raise UsageError(f"the address names the model '{named}', but --model '{model}'.", "Name one of them.")
    if parts.scheme == "grpc":
        if port is None:
            raise UsageError(f"the address '{text}' has no port:", "write it like grpc://localhost:8001.")
        return Address("grpc", text, host, port, model=named or model)
    port = port or _PORTS[parts.scheme]
    return Address("http", text, host, port, model=named or model, tls=parts.scheme == "https")


def _model_of(path: str, text: str) -> str:
    match = re.fullmatch(r"/?|/(?:v2/models/)?([^/]+)(?:/infer)?/?", path)
    if match is None:
        raise UsageError(f"cannot read the model in '{text}':", "write it like http://localhost:8000/NAME.")
    return unquote(match[1] or "")


def raw_bytes(inputs: Inputs) -> Mapping[str, bytes]:
    """The inputs as the protocol carries them: row-major, little-endian."""
    return {name: np.ascontiguousarray(a.astype(a.dtype.newbyteorder("<"), copy=False)).tobytes()
            for name, a in inputs.items()}  # fmt: skip

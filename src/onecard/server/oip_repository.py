"""The model repository extension: its requests read, its index written.

Source: Triton's "Model Repository Extension".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from onecard.server.oip_types import Buffer, ProtocolError, quote

State = Literal["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]
_ENCODER = msgspec.json.Encoder()
_LONGEST_WORD = 6  # one more than "false" has


class IndexEntry(msgspec.Struct, frozen=True):
    """One version of one model in the index.

    Args:
        name: of the model.
        version: of the model.
        state: in Triton's words.
        reason: for the state, or empty.
    """

    name: str
    version: str
    state: State
    reason: str = ""


class _IndexRequest(msgspec.Struct):
    ready: bool = False


class _ChangeRequest(msgspec.Struct):
    parameters: dict[str, msgspec.Raw] | None = None


_INDEX_REQUEST = msgspec.json.Decoder(_IndexRequest)
_CHANGE_REQUEST = msgspec.json.Decoder(_ChangeRequest)


def parse_index(body: Buffer) -> bool:
    """Read ``POST /v2/repository/index``: whether only models that are ready are asked for.

    Raises:
        ProtocolError: a body that is neither empty nor an index request.
    """
    request = _read(body, _INDEX_REQUEST)
    return request is not None and request.ready


def check_change(body: Buffer) -> None:
    """Check ``POST /v2/repository/models/{name}/load`` or ``/unload``, which say all they may in their path.

    A bundle is what it is: a configuration or files sent with the request are refused, not passed over, and not even
    decoded.

    Raises:
        ProtocolError: a body that is neither empty nor such a request, or a parameter that is not supported.
    """
    request = _read(body, _CHANGE_REQUEST)
    for name, value in ((request.parameters if request is not None else None) or {}).items():
        text = bytes(memoryview(value)[:_LONGEST_WORD])
        if text == b"null":
            continue
        if name == "unload_dependents":
            if text not in (b"true", b"false"):
                raise ProtocolError("the parameter 'unload_dependents' is neither true nor false.")
            continue  # no model depends on another here
        if name == "config" or name.startswith("file:"):
            raise ProtocolError(
                f"the parameter {quote(name)} is not taken: a model is served as its bundle says, and no request may "
                "send a configuration or a file.",
                "Change the bundle, then load it.",
            )
        raise ProtocolError(
            f"the parameter {quote(name)} of the model repository is not known, expected 'unload_dependents'."
        )


def repository_index(entries: Sequence[IndexEntry], only_ready: bool = False) -> bytes:
    """The body of the answer to ``POST /v2/repository/index``.

    Args:
        entries: all models.
        only_ready: as :func:`parse_index` found.
    """
    return _ENCODER.encode([entry for entry in entries if entry.state == "READY" or not only_ready])


def _read(body: Buffer, decoder: msgspec.json.Decoder[Any]) -> Any:
    if not len(body):
        return None
    try:
        return decoder.decode(body)
    except RecursionError:
        raise ProtocolError("the JSON is nested too deep.") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProtocolError(f"the request cannot be read: {error}.") from None

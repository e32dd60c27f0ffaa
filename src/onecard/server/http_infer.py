"""What an inference request over HTTP becomes: one of the engine's, and its answer a response.

Source: the KServe specification ``inference_rest.md`` and Triton's extensions for binary tensors and shared memory.
"""

from __future__ import annotations

from functools import partial

from onecard.server.engine_answers import EngineAnswer
from onecard.server.engine_request import EngineRequest
from onecard.server.http_types import HttpError, Request, Response
from onecard.server.oip_contract import InferContract
from onecard.server.oip_request import parse_infer
from onecard.server.oip_response import encode_infer
from onecard.server.oip_seen import SeenHead
from onecard.server.oip_types import HeldRegions, InferResponse
from onecard.server.serving import Serving
from onecard.server.shared_regions import SharedRegions

LENGTH = b"inference-header-content-length"
"""The header with the length of the JSON before binary data, in lower case."""

LENGTH_DIGITS = 10
"""More than any body needs."""


def ask(serving: Serving, regions: SharedRegions, request: Request, name: str, version: str) -> EngineRequest:
    """Send a request to the engine.

    Args:
        serving: the models.
        regions: shared memory that clients may register.
        request: with its whole body.
        name: of the model.
        version: of it; empty for the one there is.

    Returns:
        The :class:`Response` to be.

    Raises:
        HttpError: there is no such model, or it does not serve.
        OnecardError: what the request asks for cannot be done.
    """
    _, contract = serving.find(name, version)
    json_length = _json_length(request)
    seen = serving.seen(name, contract)
    head = seen.find(request.body, json_length)
    if head is not None:
        again = _ask_again(serving, regions, request, head, (name, json_length, contract))
        if again is not None:
            return again
    access = regions.access(serving.client.allocate)
    asked = parse_infer(request.body, json_length, contract, access)
    seen.learn(request.body, json_length, asked)
    sent = serving.infer(name, asked, request.client)
    sent.finish = lambda answer: _response(
        encode_infer(asked, answer.outputs, contract, (name, answer.version), access), answer
    )
    return sent


def _ask_again(
    serving: Serving,
    regions: SharedRegions,
    request: Request,
    head: SeenHead,
    known: tuple[str, int | None, InferContract],
) -> EngineRequest | None:
    """Ask what was asked before in the same words; None if they have to be read once more."""
    name, json_length, contract = known
    client, held = serving.client, None
    if head.regions:
        held = regions.access(client.allocate)
        if held is None or not held.hold(head.regions):
            return None
    sent = None
    if held is not None and head.sources:
        sent = client.infer_copies(name, head, partial(head.copy_inputs, held), request.client)
    elif json_length is not None:
        sent = client.infer_body(name, request.body, head, json_length, request.client)
    if sent is not None:
        sent.finish = lambda answer: _encoded_seen(head, answer, contract, name, held)
    return sent


def _encoded_seen(
    head: SeenHead, answer: EngineAnswer, contract: InferContract, name: str, regions: HeldRegions | None
) -> Response:
    """The answer to a request of this head."""
    encoded = head.answer(answer.outputs, answer.version, regions)
    if encoded is None:
        encoded = encode_infer(head.asked, answer.outputs, contract, (name, answer.version), regions)
        head.learn(answer.outputs, answer.version, encoded)
    return _response(encoded, answer)


def _response(encoded: InferResponse, answer: EngineAnswer) -> Response:
    """An answer as it is sent; the engine has its memory back when that is done."""
    headers = [(b"Content-Type", encoded.content_type)]
    if encoded.json_length is not None:
        headers.append((b"Inference-Header-Content-Length", b"%d" % encoded.json_length))
    return Response(200, headers, encoded.body, answer.release)


def _json_length(request: Request) -> int | None:
    value = request.headers.get(LENGTH)
    if value is None:
        return None
    if not value.isdigit() or len(value) > LENGTH_DIGITS:
        raise HttpError(400, "Inference-Header-Content-Length is not a number of bytes.")
    return int(value)

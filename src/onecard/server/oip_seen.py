"""Requests whose JSON was seen before: clients send the same head again and again, and only the data behind it differs.

What such a head means, and what the JSON of its answer says, is then known without reading or writing it. Only plain
requests are remembered: all tensors as binary data, no id, no shared memory, no classification.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from onecard.server.oip_contract import InferContract
from onecard.server.oip_types import Array, Buffer, InferRequest, InferResponse

DEFAULT_PRIORITY = 2
"""Of a request that names none: 1 goes before it, 3 and more behind."""

_MOST_HEADS = 256
_MOST_HEAD_BYTES = 2048
_MOST_ANSWERS = 16  # of one head: by version, and by the outputs' shapes where the inputs do not tell them
_ALIGNMENT_BYTES = 64


class Place(NamedTuple):
    """An input's data in a body.

    Args:
        name: of the input.
        dtype: onecard's name of it.
        shape: of the array.
        offset: from the end of the JSON, in bytes; a multiple of 64.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


class SeenHead:
    """What one head means.

    Args:
        places: of the inputs.
        nbytes: of all data behind the JSON.
        asked: the request without its inputs.

    Attributes:
        timeout_s: within which the answer is wanted; None for the model's default.
        priority: of the request, 1 being the highest; the server's default where it names none.
    """

    __slots__ = ("_answers", "asked", "nbytes", "places", "priority", "timeout_s")

    def __init__(self, places: tuple[Place, ...], nbytes: int, asked: InferRequest) -> None:
        self.places = places
        self.nbytes = nbytes
        self.asked = asked
        self.timeout_s = asked.timeout_us / 1e6 if asked.timeout_us else None
        self.priority = asked.priority or DEFAULT_PRIORITY
        self._answers: dict[tuple[object, ...], bytes] = {}

    def answer(self, answers: Mapping[str, Array], version: str) -> InferResponse | None:
        """An answer of which the JSON was written before; None if it was not."""
        arrays = [answers[wanted.name] for wanted in self.asked.outputs]
        text = self._answers.get(_key(arrays, version))
        return None if text is None else InferResponse([text, *map(_bytes, arrays)], len(text))

    def learn(self, answers: Mapping[str, Array], version: str, response: InferResponse) -> None:
        """Remember the JSON of an answer, if nothing but the arrays' own bytes is behind it."""
        arrays = [answers[wanted.name] for wanted in self.asked.outputs]
        length = response.json_length
        if length is None or len(self._answers) >= _MOST_ANSWERS:
            return
        whole = b"".join(response.body)
        if whole[length:] == b"".join(map(_bytes, arrays)):
            self._answers[_key(arrays, version)] = whole[:length]


class SeenHeads:
    """The heads that one model's clients send.

    Args:
        contract: of the model.
    """

    def __init__(self, contract: InferContract) -> None:
        self.contract = contract
        self._heads: dict[bytes, SeenHead | None] = {}

    def find(self, body: memoryview, json_length: int | None) -> SeenHead | None:
        """What a request's head means, if that is known and its data is as long as it says."""
        if json_length is None or not 0 < json_length <= _MOST_HEAD_BYTES:
            return None
        head = self._heads.get(bytes(body[:json_length]))
        return head if head is not None and head.nbytes == len(body) - json_length else None

    def learn(self, body: memoryview, json_length: int | None, asked: InferRequest) -> SeenHead | None:
        """Remember a head that was read; None if its requests must be read each time."""
        if json_length is None or not 0 < json_length <= _MOST_HEAD_BYTES:
            return None
        text = bytes(body[:json_length])
        if text in self._heads:
            return None  # one that is not plain, or with data that does not fit it
        if len(self._heads) >= _MOST_HEADS:
            self._heads.clear()
        head = self._heads[text] = _plain(asked, len(body) - json_length)
        return head


def _plain(asked: InferRequest, nbytes: int) -> SeenHead | None:
    if asked.id or asked.on_device or any(w.region or w.classes or not w.binary for w in asked.outputs):
        return None
    places, offset = [], 0
    for name, array in asked.inputs.items():
        if array.dtype == bool or offset % _ALIGNMENT_BYTES:  # truth values are looked at one by one
            return None
        places.append(Place(name, asked.dtypes[name], array.shape, offset))
        offset += array.nbytes
    if offset != nbytes:  # some of it stands in the JSON, or lies in shared memory
        return None
    return SeenHead(tuple(places), nbytes, dataclasses.replace(asked, inputs={}))


def _key(arrays: list[Array], version: str) -> tuple[object, ...]:
    return (version, *[(array.shape, array.dtype) for array in arrays])


def _bytes(array: Array) -> Buffer:
    return array.data.cast("B") if array.size and array.flags.c_contiguous else array.tobytes()

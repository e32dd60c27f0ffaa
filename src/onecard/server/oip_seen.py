"""Requests whose JSON was seen before: clients send the same head again and again, and only the data behind it differs.

What such a head means, and what the JSON of its answer says, is then known without reading or writing it. Only plain
requests are remembered: the inputs all as binary data or all in the host's shared memory, the outputs as either, no id,
no classification.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from onecard.server.oip_contract import InferContract
from onecard.server.oip_types import Array, Buffer, HeldRegions, InferRequest, InferResponse, Region

DEFAULT_PRIORITY = 2
"""Of a request that names none: 1 goes before it, 3 and more behind."""

_MOST_HEADS = 256
_MOST_HEAD_BYTES = 2048
_MOST_ANSWERS = 16  # of one head: by version, and by the outputs' shapes where the inputs do not tell them
_ALIGNMENT_BYTES = 64


class Place(NamedTuple):
    """An input's data among that of all of them.

    Args:
        name: of the input.
        dtype: onecard's name of it.
        shape: of the array.
        offset: in a body from the end of the JSON, in bytes; a multiple of 64.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


class SeenHead:
    """What one head means.

    Args:
        places: of the inputs.
        nbytes: of all data, behind the JSON or copied from shared memory.
        asked: the request without its inputs.
        sources: where each input lies in the host's shared memory; none if they are behind the JSON.

    Attributes:
        regions: all places in shared memory that its requests need, answers included.
        timeout_s: within which the answer is wanted; None for the model's default.
        priority: of the request, 1 being the highest; the server's default where it names none.
    """

    __slots__ = ("_answers", "asked", "nbytes", "places", "priority", "regions", "sources", "timeout_s")

    def __init__(
        self, places: tuple[Place, ...], nbytes: int, asked: InferRequest, sources: tuple[Region, ...] = ()
    ) -> None:
        self.places = places
        self.nbytes = nbytes
        self.asked = asked
        self.sources = sources
        self.regions = sources + tuple(wanted.region for wanted in asked.outputs if wanted.region is not None)
        self.timeout_s = asked.timeout_us / 1e6 if asked.timeout_us else None
        self.priority = asked.priority or DEFAULT_PRIORITY
        self._answers: dict[tuple[object, ...], bytes] = {}

    def copy_inputs(self, regions: HeldRegions, memory: memoryview) -> None:
        """Copy the inputs from shared memory, which holds :attr:`sources`.

        Raises:
            ProtocolError: it was cut off.
        """
        for place, source in zip(self.places, self.sources, strict=True):
            if source.byte_size:
                regions.read_into(source, memory[place.offset : place.offset + source.byte_size])

    def answer(
        self, answers: Mapping[str, Array], version: str, regions: HeldRegions | None = None
    ) -> InferResponse | None:
        """An answer of which the JSON was written before; None if it was not.

        Args:
            answers: the outputs by name.
            version: of the model that gave them.
            regions: shared memory that holds :attr:`regions`; what belongs there is written.

        Raises:
            ProtocolError: it was cut off.
            StorageError: no memory is left for what is written.
        """
        arrays = [answers[wanted.name] for wanted in self.asked.outputs]
        text = self._answers.get(_key(arrays, version))
        if text is None:
            return None
        sent: list[Buffer] = []
        for wanted, array in zip(self.asked.outputs, arrays, strict=True):
            if wanted.region is None:
                sent.append(_bytes(array))
            elif regions is None or array.nbytes > wanted.region.byte_size:
                return None
            else:
                regions.write(wanted.region, memoryview(_bytes(array)))
        return InferResponse([text, *sent], len(text) if sent else None)

    def learn(self, answers: Mapping[str, Array], version: str, response: InferResponse) -> None:
        """Remember the JSON of an answer, if nothing but the arrays' own bytes is behind it."""
        if len(self._answers) >= _MOST_ANSWERS:
            return
        arrays = [answers[wanted.name] for wanted in self.asked.outputs]
        whole = b"".join(response.body)
        length = len(whole) if response.json_length is None else response.json_length
        sent = [a for a, wanted in zip(arrays, self.asked.outputs, strict=True) if wanted.region is None]
        if whole[length:] == b"".join(map(_bytes, sent)):
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
        length = len(body) if json_length is None else json_length
        if not 0 < length <= _MOST_HEAD_BYTES:
            return None
        head = self._heads.get(bytes(body[:length]))
        if head is None or (json_length is None and not head.sources):
            return None
        return head if len(body) - length == (0 if head.sources else head.nbytes) else None

    def learn(self, body: memoryview, json_length: int | None, asked: InferRequest) -> SeenHead | None:
        """Remember a head that was read; None if its requests must be read each time."""
        if json_length is None and not asked.copied:
            return None  # the data is in the JSON: there are as many heads as requests
        length = len(body) if json_length is None else json_length
        if not 0 < length <= _MOST_HEAD_BYTES:
            return None
        text = bytes(body[:length])
        if text in self._heads:
            return None  # one that is not plain, or with data that does not fit it
        if len(self._heads) >= _MOST_HEADS:
            self._heads.clear()
        head = self._heads[text] = _plain(asked, len(body) - length)
        return head


def _plain(asked: InferRequest, nbytes: int) -> SeenHead | None:
    if asked.id or asked.on_device or any(w.classes or not (w.binary or w.region) for w in asked.outputs):
        return None
    places, offset = [], 0
    for name, array in asked.inputs.items():
        if asked.copied:
            offset += -offset % _ALIGNMENT_BYTES
        if array.dtype == bool or offset % _ALIGNMENT_BYTES:  # truth values are looked at one by one
            return None
        places.append(Place(name, asked.dtypes[name], array.shape, offset))
        offset += array.nbytes
    if asked.copied:
        if nbytes or asked.copied.keys() != asked.inputs.keys():  # some is behind the JSON, or stands in it
            return None
    elif offset != nbytes:
        return None
    sources = tuple(asked.copied[place.name] for place in places) if asked.copied else ()
    return SeenHead(tuple(places), offset, dataclasses.replace(asked, inputs={}), sources)


def _key(arrays: list[Array], version: str) -> tuple[object, ...]:
    return (version, *[(array.shape, array.dtype) for array in arrays])


def _bytes(array: Array) -> Buffer:
    return array.data.cast("B") if array.size and array.flags.c_contiguous else array.tobytes()

"""What the front lends of the memory that it shares with the engine: parts that come back with their last view."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from onecard.ipc.arena import Arena, ArenaFullError
from onecard.ipc.segment import Segment
from onecard.ipc.tensors import MARK_BYTES, RUNNING, WAITING, Target, Tensor
from onecard.server.http_held import never_fits, too_much_held
from onecard.server.oip_seen import Place
from onecard.server.oip_types import Array

_ALIGNMENT_BYTES = 64


class Lease(np.ndarray[Any, np.dtype[np.uint8]]):
    """The bytes of a part of a segment. When nothing refers to them any more, the part is given back.

    Whatever is made from ``data``, or from an array that was made from it, refers to them. The last reference may go
    in any thread, and in the middle of anything, so giving back has to be one step that nothing can come between.

    Attributes:
        offset: in the segment, in bytes.
        marked: whether a request in flight has its mark at the beginning.
    """

    offset: int
    marked: bool = False
    _give_back: Callable[[int], None] | None = None

    def release(self) -> None:
        """Give the part back now; what still refers to it may see other bytes from now on."""
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back(self.offset)

    __del__ = release


def lend(segment: Segment, offset: int, nbytes: int, give_back: Callable[[int], None]) -> Lease:
    """Lend a part of a segment.

    Args:
        segment: whose memory it is.
        offset: of the part, in bytes.
        nbytes: of the part.
        give_back: called once with the offset, from any thread.

    Raises:
        ValueError: it does not lie wholly inside.
    """
    # Over the mapping itself, not over an array of it: NumPy lets a view of a view hold the first array alone.
    lease = Lease((nbytes,), np.uint8, segment.view(offset, nbytes))
    lease.offset = offset
    lease._give_back = give_back
    return lease


class Placed(NamedTuple):
    """A request's inputs in the segment of requests.

    Args:
        lease: the part whose beginning is the request's mark.
        tensors: where the inputs lie.
        arrays: what keeps their memory, besides the lease.
        targets: outputs that are to be written to the device's memory.
    """

    lease: Lease
    tensors: tuple[Tensor, ...]
    arrays: tuple[Array, ...]
    targets: tuple[Target, ...] = ()


class OnDevice(NamedTuple):
    """What of a request lies in the device's memory that clients share.

    Args:
        inputs: with the region that each one lies in.
        outputs: where to write which.
    """

    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Target, ...] = ()


NOT_ON_DEVICE = OnDevice()


class RequestMemory:
    """The segment of requests.

    Memory is taken by one thread; it may be given back by any.

    Args:
        nbytes: of the segment.

    Raises:
        UsageError: this is not Linux.
        StorageError: the system does not give so much.
    """

    def __init__(self, nbytes: int) -> None:
        self.segment = Segment.create("onecard-requests", nbytes)
        self._arena = Arena(nbytes)
        self._freed: deque[int] = deque()
        words = self.segment.memory[: nbytes // MARK_BYTES * MARK_BYTES]
        self._marks = words.cast("I")  # one unsigned 32-bit word each

    @property
    def used_bytes(self) -> int:
        """What is lent, in whole units of the arena."""
        self._take_back()
        return self._arena.used_bytes

    def allocate(self, nbytes: int, lead: int = 0) -> memoryview:
        """Memory for a body, with room for a request's mark before it.

        Args:
            nbytes: of the body.
            lead: how far behind an address that is a multiple of 64 bytes it begins.

        Raises:
            HttpError: 503, too much is lent; 413, it would never fit.
        """
        start = MARK_BYTES + lead
        return self._lend(start + nbytes).data[start : start + nbytes]

    def place(self, inputs: Mapping[str, Array], dtypes: Mapping[str, str]) -> Placed:
        """See that all inputs lie in the segment, aligned, with a mark of their own; those that do not are copied.

        Args:
            inputs: by name.
            dtypes: onecard's names of their dtypes, where they differ from NumPy's.

        Raises:
            HttpError: as :meth:`allocate`, for what is copied.
        """
        lease: Lease | None = None
        offsets: dict[str, int] = {}
        strange_bytes = 0
        for name, array in inputs.items():
            found = _lease_of(array)
            offset = None if found is None else self.segment.offset_of(array)
            if found is None or offset is None or offset % _ALIGNMENT_BYTES:
                strange_bytes += _aligned(array.nbytes)
            else:
                offsets[name] = offset
                if lease is None and not found.marked:
                    lease = found
        arrays = tuple(inputs.values())
        if lease is None or strange_bytes:
            lease = self._lend(MARK_BYTES + strange_bytes)
            arrays = tuple(inputs[name] for name in offsets)
            self._copy({n: array for n, array in inputs.items() if n not in offsets}, lease, offsets)
        lease.marked = True
        self.clear_mark(lease)
        tensors = [
            Tensor(name, dtypes.get(name) or array.dtype.name, array.shape, offsets[name])
            for name, array in inputs.items()
        ]
        return Placed(lease, tuple(tensors), arrays)

    def place_body(self, body: memoryview, json_length: int, places: Sequence[Place]) -> Placed | None:
        """Give a mark to a request whose inputs lie, as binary data, in a body that was received where we lent memory.

        Args:
            body: the whole of it.
            json_length: of what stands before the data.
            places: of the inputs in the data.

        Returns:
            The inputs; None if the body lies elsewhere, not aligned, or is another request's too.
        """
        lease: object = body.obj
        if not isinstance(lease, Lease) or lease.marked:
            return None
        data = lease.nbytes - body.nbytes + json_length  # what we lend for a body ends with it
        if data % _ALIGNMENT_BYTES or data < MARK_BYTES:
            return None
        return self._place_at(lease, data, places)

    def place_copies(self, places: Sequence[Place], nbytes: int, copy: Callable[[memoryview], None]) -> Placed:
        """Give memory and a mark to a request whose inputs lie elsewhere.

        Args:
            places: of the inputs among their data.
            nbytes: of all data.
            copy: is given memory for it, and fills it.

        Raises:
            HttpError: as :meth:`allocate`.
        """
        lease = self._lend(MARK_BYTES + nbytes)
        copy(lease.data[MARK_BYTES : MARK_BYTES + nbytes])
        return self._place_at(lease, MARK_BYTES, places)

    def _place_at(self, lease: Lease, start: int, places: Sequence[Place]) -> Placed:
        lease.marked = True
        self.clear_mark(lease)
        data = lease.offset + start
        tensors = tuple([Tensor(name, dtype, shape, data + offset) for name, dtype, shape, offset in places])
        return Placed(lease, tensors, ())

    def is_running(self, lease: Lease) -> bool:
        """Whether the engine had put a row of the request with this mark into a batch."""
        return bool(self._marks[lease.offset // self._marks.itemsize] == RUNNING)

    def clear_mark(self, lease: Lease) -> None:
        """Set a request's mark to what it is before the engine has it."""
        self._marks[lease.offset // self._marks.itemsize] = WAITING

    def close(self) -> None:
        """Let go of the segment; what is lent stays readable until it is given back."""
        self._marks = memoryview(b"").cast("I")
        self.segment.close()

    def _lend(self, nbytes: int) -> Lease:
        self._take_back()
        try:
            offset = self._arena.take(nbytes)
        except ArenaFullError:
            if nbytes > self._arena.nbytes:
                raise never_fits(nbytes, self._arena.nbytes) from None
            raise too_much_held() from None
        return lend(self.segment, offset, nbytes, self._freed.append)

    def _take_back(self) -> None:
        while self._freed:
            self._arena.free(self._freed.popleft())

    def _copy(self, strangers: Mapping[str, Array], lease: Lease, offsets: dict[str, int]) -> None:
        """Copy arrays behind the mark, one after the other, and note where they came to lie."""
        at = MARK_BYTES
        for name, array in strangers.items():
            there: Array = np.ndarray(array.shape, array.dtype, lease.data, at)
            np.copyto(there, array)
            offsets[name] = lease.offset + at
            at += _aligned(array.nbytes)


def _lease_of(array: Array) -> Lease | None:
    """The lease that an array was made from; None for any other memory."""
    base: object = array
    while not isinstance(base, Lease):
        if isinstance(base, np.ndarray):
            base = base.base
        elif isinstance(base, memoryview):
            base = base.obj
        else:
            return None
    return base


def _aligned(nbytes: int) -> int:
    return math.ceil(nbytes / _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES

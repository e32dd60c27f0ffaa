"""Which tensors of a forward pass are alive at the same time: a dispatch mode that follows storages.

It sees the operators that really run, below autograd and below composite operators. Views and in-place results
share the storage of their base and so cost nothing. Nothing here asks what is in a tensor, so fake tensors do.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_CONVOLUTIONS = frozenset({"convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution"})
_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "linear", "mkldnn_linear"})


class Block(NamedTuple):
    """Memory of one storage: its number in the order of allocation, its bytes, and the layer that made it."""

    number: int
    nbytes: int
    layer: str


class Event(NamedTuple):
    """A block that comes to life (``allocates``) or ends."""

    block: Block
    allocates: bool


class Trace(TorchDispatchMode):
    """Follows what operators allocate while it is active.

    Args:
        held: tensors that the caller holds throughout (weights, inputs); they are not counted.

    Attributes:
        peak_bytes: the most that was alive at once, of what was allocated meanwhile.
        peak: the blocks that were alive then, the largest first.
        peak_layer: the layer that ran then.
        events: every allocation and release, in order.
        convolution_bytes: of the largest convolution, its input, weight and output together; 0 without one.
        has_products: whether a matrix product ran.
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._held = {storage_key(tensor) for tensor in held}
        self._live: dict[int, Block] = {}
        self._endings: dict[int, weakref.finalize[Any, Any]] = {}
        self._bytes = 0
        self._layers: list[str] = []
        self.peak_bytes = 0
        self.peak: tuple[Block, ...] = ()
        self.peak_layer = ""
        self.events: list[Event] = []
        self.convolution_bytes = 0
        self.has_products = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        answer = func(*args, **(kwargs or {}))
        made = [leaf for leaf in pytree.tree_leaves(answer) if isinstance(leaf, Tensor)]
        for tensor in made:
            self._see(tensor)
        name = getattr(func, "__name__", "").partition(".")[0]
        if name in _CONVOLUTIONS:
            tensors = [leaf for leaf in args if isinstance(leaf, Tensor)]
            self.convolution_bytes = max(self.convolution_bytes, sum(map(tensor_bytes, (*tensors, *made))))
        self.has_products = self.has_products or name in _PRODUCTS
        return answer

    @contextmanager
    def inside(self, layer: str) -> Iterator[None]:
        """What is allocated meanwhile belongs to this layer."""
        self.enter(layer)
        try:
            yield
        finally:
            self.leave()

    def enter(self, layer: str) -> None:
        """A layer begins."""
        self._layers.append(layer)

    def leave(self) -> None:
        """The layer that began last ends."""
        self._layers.pop()

    def close(self) -> None:
        """Follow nothing any more: what is still alive is not waited for."""
        for ending in self._endings.values():
            ending.detach()
        self._endings.clear()

    def _see(self, tensor: Tensor) -> None:
        key = storage_key(tensor)
        storage = tensor.untyped_storage()
        if key in self._held or key in self._live or not storage.nbytes():
            return
        block = Block(len(self.events), int(storage.nbytes()), self._layers[-1] if self._layers else "")
        self._live[key] = block
        self._endings[key] = weakref.finalize(storage, self._end, key)
        self._endings[key].atexit = False
        self.events.append(Event(block, True))
        self._bytes += block.nbytes
        if self._bytes > self.peak_bytes:
            self.peak_bytes = self._bytes
            self.peak = tuple(sorted(self._live.values(), key=lambda b: -b.nbytes))
            self.peak_layer = block.layer

    def _end(self, key: int) -> None:
        """A storage is gone; its address may be given to another at once."""
        self._endings.pop(key, None)
        block = self._live.pop(key)
        self._bytes -= block.nbytes
        self.events.append(Event(block, False))


def storage_key(tensor: Tensor) -> int:
    """What tells a storage from all others that are alive."""
    return int(tensor.untyped_storage()._cdata)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind some tensors, each counted once."""
    found = {storage_key(t): int(t.untyped_storage().nbytes()) for t in tensors}
    return sum(found.values())


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements, whatever its storage holds beside them."""
    return int(tensor.numel()) * tensor.dtype.itemsize

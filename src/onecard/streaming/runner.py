"""Runs the parts in order while the weights of those that come next are copied to the device.

Copy slots are used in turn by the streamed parts, round and round: the part that used a slot is done, then the slot is
written for the part that is as many places further on as there are slots. The places go on across the end of a call, so
that the first parts of the next call are copied while the last of this one compute.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from onecard.errors import DeviceMemoryError, EngineClosedError
from onecard.streaming.link import Link, Mark
from onecard.streaming.residency import Residency
from onecard.streaming.split import CONSTANT, WEIGHT, Ref, Split
from onecard.streaming.store import Layout, Source, host_buffer, lay_out, views


class StreamWarning(UserWarning):
    """Something that makes streaming slower than it could be."""


class StreamRunner:
    """A split model, loaded. Thread-safe: one call runs at a time.

    Args:
        split: the parts.
        residency: which weights stay on the device.
        source: gives each weight's values, once for each part that copies it; released after its last use.
        link: to the device.

    Attributes:
        residency: as given.
        copied_bytes: since it was loaded.
        is_pinned: whether the copies come from locked memory.
    """

    def __init__(self, split: Split, residency: Residency, source: Source, link: Link) -> None:
        self.residency = residency
        self.copied_bytes = 0
        self.is_pinned = True
        self._split = split
        self._link = link
        self._lock = threading.Lock()
        self._closed = False
        self._stale = True  # the slots hold nothing, or not what the next call begins with
        self._step = 0  # the streamed part that is computed next, counted from the last restart
        self._kept: list[Tensor] = []  # the one buffer of what stays on the device
        self._kept_views: dict[str, Tensor] = {}
        self._slots: list[Tensor] = []
        self._ready: list[Mark] = []  # of each slot: when its last copy is done
        self._hosts: dict[int, tuple[Tensor, Layout]] = {}  # of each streamed part
        self._bound: dict[tuple[int, int], list[Tensor | str]] = {}
        pinned: list[Tensor] = []
        self._finalizer = weakref.finalize(self, _release, link, pinned)
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._load(source, pinned)
                self._restart()
        except BaseException:
            self.close()
            raise

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run once.

        Args:
            inputs: in the order of the split's, on the link's device.

        Returns:
            The answers in the order of the split's outputs. They are the caller's own; on a card they may still be
            under way on the current stream.

        Raises:
            EngineClosedError: it was closed.
            DeviceMemoryError: activations found no room.
        """
        with self._lock, torch.inference_mode():
            if self._closed:
                raise EngineClosedError("this streamed model is closed.", "Make it again.")
            try:
                if self._stale:
                    self._restart()
                return self._pass(inputs)
            except BaseException as error:
                self._stale = True
                if not isinstance(error, torch.OutOfMemoryError):
                    raise
                raise DeviceMemoryError(
                    f"the activations found no room beside the weights on {self._link.device}: {error}",
                    "Run a smaller batch, or leave more for activations with activation_bytes.",
                ) from error

    def close(self) -> None:
        """Release all memory, on the device and here, once what is under way is done."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            try:
                self._finalizer()
            finally:
                for buffer in (*self._kept, *self._slots):
                    self._link.free(buffer)
                for held in (self._kept, self._kept_views, self._slots, self._ready, self._hosts, self._bound):
                    held.clear()

    def _load(self, source: Source, pinned: list[Tensor]) -> None:
        """Fill the device's buffer and those of main memory, a part after the other, so that a source can give up."""
        split, kept = self._split, self.residency.kept
        order = dict.fromkeys(name for part in split.parts for name in part.weights)
        layout = lay_out([name for name in order if name in kept], split.weights)
        if layout.nbytes:
            self._kept.append(self._link.allocate(layout.nbytes))
            self._kept_views = views(self._kept[0], layout, split.weights)
        for _ in range(self.residency.slots):
            self._slots.append(self._link.allocate(self.residency.slot_bytes))
        left = Counter(name for part in split.parts for name in part.weights)
        streamed = set(self.residency.streamed)
        for index, part in enumerate(split.parts):
            targets = {name: self._kept_views[name] for name in part.weights if name in kept}
            if index in streamed:
                layout = lay_out([name for name in part.weights if name not in kept], split.weights)
                buffer = host_buffer(layout.nbytes)
                self._hosts[index] = (buffer, layout)
                targets |= views(buffer, layout, split.weights)
            self._fill(targets, source, left)
            if index in streamed:
                self._pin(self._hosts[index][0], pinned)
        self._link.finish()

    def _fill(self, targets: dict[str, Tensor], source: Source, left: Counter[str]) -> None:
        """Copy the values of one part's weights; what is kept is copied with the first part that uses it."""
        for name, target in targets.items():
            weight = self._split.weights[name]
            if name not in left:  # kept, and there already
                continue
            target.copy_(source.take(weight))
            left[name] -= 1
            if name in self.residency.kept or left[name] == 0:
                source.release(weight)
                left.pop(name)

    def _pin(self, buffer: Tensor, pinned: list[Tensor]) -> None:
        if not self.is_pinned:
            return
        if self._link.pin(buffer):
            pinned.append(buffer)
            return
        self.is_pinned = False
        warnings.warn(
            "main memory could not be locked for the weights, so that they are copied at less than half of the "
            "link's rate; lower the limit on what else is locked, or raise 'ulimit -l'.",
            StreamWarning,
            stacklevel=5,
        )

    def _restart(self) -> None:
        """Start the first copies of a pass, whatever the slots hold now."""
        now = self._link.mark()
        self._step = 0
        self._ready = [self._copy(index, index, now) for index in range(len(self._slots))]
        self._stale = False

    def _copy(self, step: int, slot: int, after: Mark) -> Mark:
        """Start the copy of a step's part into a slot; after the last part of a pass comes the first."""
        streamed = self.residency.streamed
        buffer, _ = self._hosts[streamed[step % len(streamed)]]
        self.copied_bytes += buffer.numel()
        return self._link.copy(self._slots[slot][: buffer.numel()], buffer, after)

    def _pass(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        values: dict[str, object] = dict(zip(self._split.inputs, inputs, strict=True))
        for index, part in enumerate(self._split.parts):
            slot = self._arrive(index)
            arguments = [values[a] if isinstance(a, str) else a for a in self._arguments(index, slot)]
            answer = part.module.forward(*arguments)
            given = answer if part.is_tuple else (answer,)
            if slot >= 0:  # a view of a weight must outlive the slot
                given = tuple(_apart(value, [self._slots[slot]]) for value in given)
                self._leave(slot)
            values.update(zip(part.gives, given, strict=True))
            for name in self._split.dies[index]:
                del values[name]
            del arguments, answer, given
        return tuple(self._answer(ref, values) for ref in self._split.outputs)

    def _arrive(self, index: int) -> int:
        """Wait (on the device) for a part's weights, and tell the slot that holds them; -1 if all of them are kept."""
        if index not in self._hosts:
            return -1
        slot = self._step % len(self._slots)
        self._link.wait(self._ready[slot])
        return slot

    def _leave(self, slot: int) -> None:
        """Give up the slot of the part that was just computed to the next part in turn."""
        self._ready[slot] = self._copy(self._step + len(self._slots), slot, self._link.mark())
        self._step += 1

    def _arguments(self, index: int, slot: int) -> list[Tensor | str]:
        """What a part takes: tensors that lie where they always do, and names of values."""
        if (index, slot) not in self._bound:
            weights = dict(self._kept_views)
            if slot >= 0:
                weights |= views(self._slots[slot], self._hosts[index][1], self._split.weights)
            takes = self._split.parts[index].takes
            self._bound[index, slot] = [self._argument(ref, weights) for ref in takes]
        return self._bound[index, slot]

    def _argument(self, ref: Ref, weights: dict[str, Tensor]) -> Tensor | str:
        if ref.kind == WEIGHT:
            return weights[ref.name]
        return self._split.constants[ref.name] if ref.kind == CONSTANT else ref.name

    def _answer(self, ref: Ref, values: dict[str, object]) -> Tensor:
        held = [*self._kept, *self._split.constants.values()]
        value = self._split.constants[ref.name] if ref.kind == CONSTANT else values[ref.name]
        answer = _apart(value, held)
        assert isinstance(answer, Tensor)  # the split refuses programs with other answers
        return answer


def _apart(value: object, held: Sequence[Tensor]) -> object:
    """The value, or a copy if it lies in the memory of one of these tensors."""
    if isinstance(value, Tensor) and value.numel():
        place = value.untyped_storage().data_ptr()
        if any(place == tensor.untyped_storage().data_ptr() for tensor in held):
            return value.clone()
    return value


def _release(link: Link, pinned: list[Tensor]) -> None:
    """Unlock main memory when no copy can be reading it any more; also when a runner is dropped without closing."""
    link.finish()
    for buffer in pinned:
        link.unpin(buffer)
    pinned.clear()

"""Which parts stay on the device and which are copied in every pass, from sizes alone; no torch, no device.

A weight that stays serves every part that uses it, so a tied weight is kept once. The others pass through copy slots,
each as large as the largest part that is copied; so a part that is much larger than the rest is better kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from onecard.errors import DeviceMemoryError

ALIGNMENT_BYTES = 256
"""Every weight starts at a multiple of this, as the device's own allocations do: kernels choose by alignment."""

DEFAULT_LINK_BYTES_PER_S = 25e9
"""PCIe 4.0 x16 from pinned memory, where nothing was measured."""

_LARGE_TRIED = 8
_SHARED_TRIED = 6


@dataclass(frozen=True)
class Budget:
    """What the device gives to one model.

    Args:
        device_bytes: for everything: weights, copy slots, activations.
        activation_bytes: the most that inputs, activations, outputs and kernels' workspace take at once.
        slots: how many parts may be on their way or in use at once; two let a copy hide behind a computation.
        link_bytes_per_s: from main memory to the device.
        compute_s: of one pass with all weights on the device; 0 where it is not known.
    """

    device_bytes: int
    activation_bytes: int = 0
    slots: int = 2
    link_bytes_per_s: float = DEFAULT_LINK_BYTES_PER_S
    compute_s: float = 0.0


@dataclass(frozen=True)
class Residency:
    """Where the weights of each part are.

    Args:
        kept: names of the weights that stay on the device.
        kept_bytes: what they take there.
        streamed: the parts, by index and in order, of which something is copied in every pass.
        slots: copy slots; 0 if nothing is copied, 1 if the budget has no room to overlap.
        slot_bytes: of one slot.
        pass_bytes: copied in one pass.
        budget: what it was planned for.
    """

    kept: frozenset[str]
    kept_bytes: int
    streamed: tuple[int, ...]
    slots: int
    slot_bytes: int
    pass_bytes: int
    budget: Budget

    @property
    def weight_bytes(self) -> int:
        """Taken on the device by weights and slots."""
        return self.kept_bytes + self.slots * self.slot_bytes

    @property
    def device_bytes(self) -> int:
        """Taken on the device by everything."""
        return self.weight_bytes + self.budget.activation_bytes

    @property
    def pass_s(self) -> float:
        """Predicted seconds of one pass: the longer of copying and computing, or both where they cannot overlap."""
        copy_s = self.pass_bytes / self.budget.link_bytes_per_s
        if self.slots == 1:
            return copy_s + self.budget.compute_s
        return max(copy_s, self.budget.compute_s)


def aligned(nbytes: int) -> int:
    """Bytes up to where the next weight may start."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def plan_residency(parts: Sequence[Mapping[str, int]], budget: Budget) -> Residency:
    """Keep as much on the device as fits, spread evenly between what is copied, so that computing hides copying.

    Args:
        parts: in the order in which they run; the bytes of each weight that a part uses, by name. A weight in
            several parts is one weight.
        budget: of the device.

    Returns:
        The plan that copies least, with as many slots as fit.

    Raises:
        DeviceMemoryError: not even one slot fits; the message names the smallest budget that works.
    """
    sizes = _Sizes(parts)
    everything = frozenset(sizes.nbytes)
    if sizes.total(everything) + budget.activation_bytes <= budget.device_bytes:
        return Residency(everything, sizes.total(everything), (), 0, 0, 0, budget)
    starts = _starts(sizes)
    for slots in range(max(1, budget.slots), 0, -1):
        room = budget.device_bytes - budget.activation_bytes
        fitting = [start for start in starts if sizes.device_bytes(start, slots) <= room]
        plans = [_spread(sizes, start, slots, room) for start in fitting]
        if plans:
            return _residency(sizes, min(plans, key=sizes.pass_bytes), slots, budget)
    raise _too_small(sizes, starts, budget)


@dataclass
class _Sizes:
    """The parts' sizes, with what several parts share told apart from what is one part's own."""

    parts: Sequence[Mapping[str, int]]
    nbytes: dict[str, int] = field(init=False)
    own: list[int] = field(init=False)
    shared: list[tuple[str, ...]] = field(init=False)
    names: list[frozenset[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.nbytes = {name: aligned(size) for part in self.parts for name, size in part.items()}
        uses = Counter(name for part in self.parts for name in part)
        self.own = [sum(self.nbytes[n] for n in part if uses[n] == 1) for part in self.parts]
        self.shared = [tuple(n for n in part if uses[n] > 1) for part in self.parts]
        self.names = [frozenset(part) for part in self.parts]

    def total(self, names: frozenset[str]) -> int:
        return sum(self.nbytes[name] for name in names)

    def left(self, chosen: _Chosen) -> list[int]:
        """Bytes of each part that are still to be copied."""
        return [
            0 if i in chosen.parts else own + sum(self.nbytes[n] for n in shared if n not in chosen.shared)
            for i, (own, shared) in enumerate(zip(self.own, self.shared, strict=True))
        ]

    def kept_bytes(self, chosen: _Chosen) -> int:
        return sum(self.own[i] for i in chosen.parts) + sum(self.nbytes[n] for n in chosen.shared)

    def device_bytes(self, chosen: _Chosen, slots: int) -> int:
        return self.kept_bytes(chosen) + slots * max(self.left(chosen), default=0)

    def pass_bytes(self, chosen: _Chosen) -> int:
        return sum(self.left(chosen))

    def with_parts(self, chosen: _Chosen, more: Sequence[int]) -> _Chosen:
        """These parts kept as well, and with them the weights that they share with others."""
        shared = chosen.shared.union(*(self.shared[i] for i in more))
        return _Chosen(chosen.parts.union(more), shared)


@dataclass(frozen=True)
class _Chosen:
    """Parts that stay whole, and weights of several parts that stay."""

    parts: frozenset[int]
    shared: frozenset[str]


def _starts(sizes: _Sizes) -> list[_Chosen]:
    """What might be kept at the very least: some shared weights, small ones first, and some of the largest parts."""
    shared = sorted({n for names in sizes.shared for n in names}, key=lambda n: sizes.nbytes[n])
    prefixes = {0, *range(max(0, len(shared) - _SHARED_TRIED), len(shared) + 1)}
    result: list[_Chosen] = []
    for count in sorted(prefixes):
        first = _Chosen(frozenset(), frozenset(shared[:count]))
        left = sizes.left(first)
        largest = sorted(range(len(left)), key=lambda i: -left[i])
        result.append(first)
        for many, (here, following) in enumerate(pairwise(largest[: _LARGE_TRIED + 1]), start=1):
            if left[here] > left[following]:  # keeping it makes the slots smaller
                result.append(sizes.with_parts(first, largest[:many]))
    return result


def _spread(sizes: _Sizes, start: _Chosen, slots: int, room: int) -> _Chosen:
    """The most parts more that fit, at even distances; then whatever single parts still fit, the largest first."""
    left = sizes.left(start)
    rest = [i for i, size in enumerate(left) if size]

    def evenly(count: int) -> _Chosen:
        return sizes.with_parts(start, [rest[(2 * i + 1) * len(rest) // (2 * count)] for i in range(count)])

    low, high = 0, len(rest)
    while low < high:
        middle = (low + high + 1) // 2
        if sizes.device_bytes(evenly(middle), slots) <= room:
            low = middle
        else:
            high = middle - 1
    chosen = evenly(low)
    free = room - sizes.device_bytes(chosen, slots)
    for index in sorted(set(rest) - chosen.parts, key=lambda i: -left[i]):
        if left[index] <= free or left[index] == max(left):  # without the largest, the slots may shrink
            more = sizes.with_parts(chosen, [index])
            if sizes.device_bytes(more, slots) <= room:
                chosen, free = more, room - sizes.device_bytes(more, slots)
    return chosen


def _residency(sizes: _Sizes, chosen: _Chosen, slots: int, budget: Budget) -> Residency:
    left = sizes.left(chosen)
    kept = chosen.shared.union(*(sizes.names[i] for i in chosen.parts))
    streamed = tuple(i for i, size in enumerate(left) if size)
    return Residency(kept, sizes.kept_bytes(chosen), streamed, slots, max(left, default=0), sum(left), budget)


def _too_small(sizes: _Sizes, starts: Sequence[_Chosen], budget: Budget) -> DeviceMemoryError:
    smallest = min(sizes.device_bytes(start, 1) for start in starts)
    needed = smallest + budget.activation_bytes
    largest = max(sizes.nbytes, key=lambda name: sizes.nbytes[name], default="")
    weight = f" (its largest weight, '{largest}', {text(sizes.nbytes[largest])})" if largest else ""
    return DeviceMemoryError(
        f"{text(budget.device_bytes)} of device memory is too little: the largest part of the model takes "
        f"{text(smallest)}{weight} and activations {text(budget.activation_bytes)}.",
        f"Give at least {text(needed)} ({needed} bytes), or a smaller batch, or a lower precision.",
    )


def text(nbytes: int) -> str:
    """Bytes for people: ``3.25 GiB``."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} B"

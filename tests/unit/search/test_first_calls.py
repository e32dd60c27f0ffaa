"""The first calls of a variant, between which its peak of memory is read."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

from torch import Tensor

from onecard.search.worker import _first_calls
from onecard.spec import parse_spec


class Holds:
    """Sees whether what it was given before is still there."""

    def __init__(self) -> None:
        self.given: list[weakref.ref[Tensor]] = []
        self.answered: list[weakref.ref[Tensor]] = []
        self.rows: list[int] = []

    def __call__(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        assert all(ref() is None for ref in (*self.given, *self.answered)), "an earlier call's tensors are held"
        answer = inputs["x"] + 1
        self.given.append(weakref.ref(inputs["x"]))
        self.answered.append(weakref.ref(answer))
        self.rows.append(len(answer))
        return {"y": answer}


def test_one_call_is_held_at_a_time() -> None:
    job = SimpleNamespace(
        spec=parse_spec(["x: float32[B,5], B=1..8"]), buckets=({"B": 1}, {"B": 8}, {"B": 4}), device="cpu"
    )
    run, told = Holds(), []
    found = _first_calls(run, job, None, told.append)
    assert run.rows == [1, 8, 4]
    assert told == list(job.buckets)
    assert len(found) == 3
    assert all(ms > 0 for ms in found)
    assert run.answered[-1]() is None

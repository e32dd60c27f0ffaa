"""What tuning keeps open: the models, and one engine at a time over as many of them as it has lanes."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from onecard.errors import DeviceMemoryError
from onecard.inputs import make_inputs
from onecard.runtime.curve import LanePlace, lengths_of, measure_curve
from onecard.runtime.engine import Engine, EngineOptions
from onecard.runtime.faults import is_out_of_memory
from onecard.runtime.ingest import raw_spec
from onecard.runtime.limits import BatchPolicy
from onecard.runtime.open_loop import Inputs, Load, LoadResult, run_load
from onecard.runtime.rate_search import Candidate
from onecard.runtime.served import Served
from onecard.runtime.stages import open_stage
from onecard.runtime.stats import BatchStats
from onecard.spec import Spec
from onecard.tuning import LoadPoint

OpenModel = Callable[[], Served]

_REQUESTS = 64  # different ones that are sent in turn, if they are not too large
_MOST_BYTES = 256 << 20
_SEED = 20_240_517


class Bench:
    """Models that are measured, opened when they are first needed; close it, or use it in a ``with`` block.

    Args:
        model: the first; closed with this, as all others are.
        open_model: gives one more of the same model.
        options: of the engines, but for policy and lanes.
        rows: of every request.
    """

    def __init__(self, model: Served, open_model: OpenModel, options: EngineOptions, rows: int = 1) -> None:
        self._open_model = open_model
        self._options = options
        self._models = [model]
        self._engine: Engine | None = None
        self._engine_lanes = 0
        self._engine_rows = 0
        self._batch_rows: list[int] = []
        self._garbage = _Garbage()
        self.model = model
        self._rows = rows

    def curve(
        self,
        lanes: int,
        batches: Sequence[int],
        point_s: float,
        until: float,
        observe: Callable[[int, int], None] = lambda batch, done: None,
    ) -> list[LoadPoint]:
        """The curve on so many lanes (see :func:`onecard.runtime.curve.measure_curve`).

        Buffers are made for the largest size. Where memory is short already for them, the largest sizes are points
        that failed, and the rest is measured.
        """
        self._close_engine()
        left, failed = sorted({*batches}), list[LoadPoint]()
        while left:
            with ExitStack() as stack:
                try:
                    places = [self._place(model, left[-1], stack) for model in self._models_for(lanes)]
                except Exception as error:
                    if not is_out_of_memory(error) and not isinstance(error, DeviceMemoryError):
                        raise
                    failed.insert(0, LoadPoint(left.pop(), lanes, failed="out of memory"))
                else:
                    return [*measure_curve(places, left, point_s, until, observe), *failed]
            self._give_memory_back()
        return failed

    def load(self, candidate: Candidate, most_rows: int, load: Load) -> tuple[LoadResult, float]:
        """Run requests against an engine with a setting.

        Args:
            candidate: batch, delay and lanes.
            most_rows: of any batch that will be tried on so many lanes.
            load: how many requests, and when.

        Returns:
            What it gave, and the rows of a batch on average.

        Raises:
            DeviceMemoryError: an engine with so many lanes does not fit.
        """
        engine = self._engine_for(candidate.lanes, most_rows)
        engine.reconfigure(BatchPolicy(max_delay_s=candidate.max_delay_ms / 1e3, max_rows=candidate.batch))
        self._batch_rows.clear()
        result = run_load(engine, self.requests, load)
        return result, sum(self._batch_rows) / max(1, len(self._batch_rows))

    @functools.cached_property
    def requests(self) -> list[Inputs]:
        """What is sent, as callers would: NumPy arrays of the longest lengths, each with rows of its own."""
        return _requests(self.model, raw_spec(self.model.spec, self._options.ingest), self._rows)

    def close(self) -> None:
        """Release everything."""
        self._close_engine()
        self._garbage.take_back()
        for model in self._models:
            model.close()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _models_for(self, lanes: int) -> list[Served]:
        while len(self._models) < lanes:
            self._models.append(self._open_model())
        return self._models[:lanes]

    def _place(self, model: Served, most_rows: int, stack: ExitStack) -> LanePlace:
        options = replace(self._options, policy=BatchPolicy(max_rows=most_rows))
        stage = open_stage(model, options)
        stack.callback(stage.close)
        return LanePlace(model, stage, raw_spec(model.spec, options.ingest))

    def _engine_for(self, lanes: int, most_rows: int) -> Engine:
        if self._engine is not None and (lanes, most_rows) == (self._engine_lanes, self._engine_rows):
            return self._engine
        self._close_engine()
        options = replace(self._options, policy=BatchPolicy(max_rows=most_rows), lanes=lanes)
        models = [cast("Served", _Lent(model)) for model in self._models_for(lanes)]
        try:
            self._engine = Engine(models, options, self._count)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._give_memory_back()
            raise DeviceMemoryError(f"an engine does not fit in the device's memory with lanes={lanes}.") from error
        self._engine_lanes, self._engine_rows = lanes, most_rows
        self._garbage.set_aside()
        return self._engine

    def _count(self, stats: BatchStats) -> None:
        self._batch_rows.append(stats.rows)

    def _close_engine(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close(0.0)
            self._give_memory_back()

    def _give_memory_back(self) -> None:
        if self.model.device != "cpu":
            torch.cuda.empty_cache()


class _Garbage:
    """Keeps Python's collector away from all that was there before the requests, as a server does.

    A full collection of what importing PyTorch alone leaves takes over 0.1 s, and holds up every request meanwhile.
    """

    def __init__(self) -> None:
        self._others = gc.get_freeze_count() > 0  # whoever did it before wants it to stay so

    def set_aside(self) -> None:
        gc.collect()
        gc.freeze()

    def take_back(self) -> None:
        if not self._others:
            gc.unfreeze()


class _Lent:
    """A model that an engine does not close."""

    def __init__(self, model: Served) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def close(self) -> None:
        """The bench does it."""


def _requests(model: Served, spec: Spec, rows: int) -> list[Inputs]:
    batch = spec.batch_symbol
    size = dict(zip((name for name in spec.symbols if name != batch), lengths_of(model), strict=True))
    if batch is not None:
        size[batch] = rows
    size = {name: size[name] for name in spec.symbols}
    found: list[Inputs] = []
    nbytes = 0
    while len(found) < _REQUESTS and nbytes * (len(found) + 1) <= _MOST_BYTES * max(1, len(found)):
        tensors = make_inputs(spec, size, seed=_SEED + len(found))
        found.append({name: _as_array(tensor) for name, tensor in tensors.items()})
        nbytes += sum(tensor.nbytes for tensor in tensors.values())
    return found


def _as_array(tensor: torch.Tensor) -> torch.Tensor | np.ndarray[Any, Any]:
    return tensor if tensor.dtype == torch.bfloat16 else tensor.numpy()  # NumPy has no bfloat16

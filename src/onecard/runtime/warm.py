"""Every size is run before the first request: times are known then, and memory has held it all."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from onecard.errors import DeviceMemoryError
from onecard.inputs import make_inputs
from onecard.runtime.entries import Source
from onecard.runtime.faults import is_out_of_memory
from onecard.runtime.ingest import Ingest, raw_spec
from onecard.runtime.served import Served
from onecard.runtime.slots import Array
from onecard.runtime.stages import largest_sizes
from onecard.runtime.staging import Stage
from onecard.spec import Bucket, Spec, bucket_label

if TYPE_CHECKING:
    from onecard.runtime.dispatch import Dispatch
    from onecard.runtime.engine import EngineOptions

_RUNS = 2  # the first pays for what is made lazily, the second is timed


def warm_up(model: Served, stage: Stage, options: EngineOptions, dispatch: Dispatch) -> list[str]:
    """Run every size of a lane, the largest first; one that does not fit in memory is ruled out.

    Args:
        model: what runs.
        stage: where.
        options: the engine's.
        dispatch: learns how long each size takes, and which are too large.

    Returns:
        What was ruled out, for the log.

    Raises:
        DeviceMemoryError: not even the smallest size fits.
    """
    skipped = []
    limit = options.policy.max_rows
    sizes = [*largest_sizes(model, limit), *(s for s in model.sizes() if _rows(model, s) <= (limit or math.inf))]
    for index, size in enumerate(sizes):
        if size in sizes[:index] or not dispatch.runs(size):
            continue
        try:
            seconds = _time(model, stage, size, options.ingest)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if model.device != "cpu":
                torch.cuda.empty_cache()
            if not dispatch.shrink(size):
                raise DeviceMemoryError(
                    f"the model does not fit in the device's memory, not even at {bucket_label(size)}.",
                    "Free memory on the device, or see what would fit with onecard plan.",
                ) from error
            skipped.append(f"{bucket_label(size)} does not fit in the device's memory")
            continue
        dispatch.know(size, seconds)
    return skipped


def _time(model: Served, stage: Stage, size: Bucket, ingests: Sequence[Ingest]) -> float:
    """Seconds of one batch, host to host; raw forms of the inputs are run once too, since they compile kernels."""
    raw = [_source(model, raw_spec(model.spec, ingests), size)] if ingests else []
    seconds = 0.0
    for source in (*raw, *[_source(model, model.spec, size)] * _RUNS):
        began = time.perf_counter()
        flight = stage.launch([source], source.rows, size)
        try:
            flight.wait()
        finally:
            flight.release()
        seconds = time.perf_counter() - began
    return seconds


def _source(model: Served, sent: Spec, size: Bucket) -> Source:
    inputs: dict[str, Array] = dict(make_inputs(sent, size))
    return Source(inputs, 0, _rows(model, size))


def _rows(model: Served, size: Bucket) -> int:
    return size.get(model.spec.batch_symbol or "", 1)

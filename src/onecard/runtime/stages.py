"""The stage that fits a model: on the CPU, or on a GPU with pinned memory and streams."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onecard.runtime.served import Served
from onecard.runtime.staging import CpuStage, Stage
from onecard.spec import Bucket

if TYPE_CHECKING:
    from onecard.runtime.engine import EngineOptions


def open_stage(model: Served, options: EngineOptions) -> Stage:
    """Make the stage of one lane, with buffers for the largest batch that the options let through.

    Args:
        model: what it runs.
        options: the engine's.
    """
    sizes = largest_sizes(model, options.policy.max_rows)
    if model.device == "cpu":
        return CpuStage(model, sizes, options.ingest)
    from onecard.runtime.staging_cuda import CudaOptions, CudaStage

    return CudaStage(model, sizes, options.ingest, CudaOptions(options.depth, options.timings))


def largest_sizes(model: Served, max_rows: int | None = None) -> list[Bucket]:
    """For every class of lengths that a model knows, the size of its fullest batch.

    Args:
        model: what will be run.
        max_rows: most rows of a batch, if there is such a bound.
    """
    batch = model.spec.batch_symbol
    found = []
    for size in [*model.sizes(), model.spec.largest()]:
        lengths = model.lengths_of(tuple(n for name, n in size.items() if name != batch))
        rows = model.max_rows(lengths)
        found.append(model.fit(rows if max_rows is None else min(rows, max_rows), lengths))
    return [size for index, size in enumerate(found) if size not in found[:index]]

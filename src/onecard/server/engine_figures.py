"""What the engine's process tells of its models for metrics: queues, batches, times, memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec
from msgspec import UNSET, UnsetType

from onecard.spec import bucket_label
from onecard.telemetry.snapshot import ModelFigures, SentinelFigures

if TYPE_CHECKING:
    from onecard.runtime.sentinel import Sentinel
    from onecard.server.engine_models import Serving

_MEMORY = {"allocated": "allocated_bytes", "reserved": "reserved_bytes", "peak": "peak_reserved_bytes",
           "pinned": "pinned_bytes"}  # fmt: skip


def encode_figures(models: Iterable[Serving]) -> bytes:
    """The figures of what serves, for :attr:`onecard.ipc.messages.Told.figures`."""
    return msgspec.json.encode([model_figures(model) for model in models])


def decode_figures(data: bytes) -> tuple[ModelFigures, ...]:
    """What :func:`encode_figures` wrote; nothing of nothing."""
    return msgspec.json.decode(data, type=tuple[ModelFigures, ...]) if data else ()


def model_figures(serving: Serving) -> ModelFigures:
    """One version as its engine has it; what the fronts know of it is left at its default."""
    engine, counters = serving.engine, serving.counters
    policy, memory = engine.options.policy, engine.memory
    items, _, nbytes = engine.queued
    times, batch_rows = counters.distributions()
    variants = {bucket_label(size): variant for size, variant in engine.variants}
    return ModelFigures(
        name=serving.name,
        version=serving.version,
        variant=next(iter(variants.values()), ""),
        variants=variants if len(set(variants.values())) > 1 else UNSET,
        skipped_variants=len(engine.ruled_out),
        device=engine.device,
        queue_requests=items,
        queue_bytes=nbytes,
        queue_limit_requests=policy.queue_items,
        queue_limit_bytes=policy.queue_bytes,
        p99_target_s=UNSET if serving.p99_s is None else serving.p99_s,
        rows=counters.rows,
        padded_rows=round(counters.padded_rows),
        batches=counters.executions,
        histograms=times,
        batch_rows=batch_rows,
        request_stages_s=counters.stages_s(),
        load_s=serving.load_s,
        sentinel=_sentinel(serving.sentinel),
        memory_bytes={kind: value for kind, name in _MEMORY.items() if (value := getattr(memory, name))},
    )


def _sentinel(sentinel: Sentinel | None) -> SentinelFigures | UnsetType:
    if sentinel is None or sentinel.off:
        return UNSET
    found = sentinel.figures()
    return SentinelFigures(found.checked, found.wrong, found.differences)

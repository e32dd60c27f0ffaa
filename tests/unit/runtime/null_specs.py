"""Specs and models without weights for tests of the engine: what comes back tells whose rows it was made of."""

from __future__ import annotations

import msgspec
import numpy as np
from torch import Tensor

from onecard.runtime.engine import Engine, EngineOptions
from onecard.runtime.limits import BatchPolicy
from onecard.runtime.null import NullModel
from onecard.spec import Spec, TensorSpec, parse_spec

ROWS = msgspec.structs.replace(
    parse_spec(["x: float32[B,3], B=1..200"]), outputs=(TensorSpec("y", "float32", ("B", 3)),)
)
TOKENS = msgspec.structs.replace(
    parse_spec(["ids: int64[B,S], B=1..8, S=1..64"]), outputs=(TensorSpec("twice", "int64", ("B", "S")),)
)
ALONE = msgspec.structs.replace(parse_spec(["x: float32[3]"]), outputs=(TensorSpec("y", "float32", (3,)),))


def twice_and_one(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"y": inputs["x"] * 2 + 1}


def rows_of(tag: int, rows: int) -> np.ndarray:
    """Rows that no other tag has."""
    return (np.arange(rows * 3, dtype=np.float32).reshape(rows, 3) / 4 + 1000 * tag).astype(np.float32)


def policy(**fields: object) -> EngineOptions:
    return EngineOptions(policy=BatchPolicy(**fields))  # type: ignore[arg-type]


def engine_of(spec: Spec = ROWS, compute=twice_and_one, options: EngineOptions | None = None, lanes: int = 1, **more):
    """An engine of a null model: ``more`` goes to the model."""
    on_batch = more.pop("on_batch", None)
    return Engine([NullModel(spec, compute=compute, **more) for _ in range(lanes)], options, on_batch)

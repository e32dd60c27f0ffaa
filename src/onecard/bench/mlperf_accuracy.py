"""LoadGen's accuracy log: the answers it received, read back and put in the order of the data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onecard.bench.mlperf_job import LOG_PREFIX
from onecard.bench.mlperf_system import AnswerField
from onecard.errors import EngineError

ACCURACY_LOG = f"{LOG_PREFIX}accuracy.json"


def read_answers(folder: Path, fields: Sequence[AnswerField], rows: int) -> dict[str, Tensor]:
    """The answers to all samples.

    Args:
        folder: with LoadGen's files.
        fields: what the bytes of an answer hold.
        rows: samples that there are.

    Returns:
        Output name to tensor [rows, ...].

    Raises:
        EngineError: the log cannot be read, or does not hold an answer for every sample.
    """
    found = _by_sample(folder / ACCURACY_LOG)
    missing = [row for row in range(rows) if row not in found]
    if missing or len(found) != rows:
        raise EngineError(f"LoadGen's accuracy log has answers for {len(found)} of {rows} samples.", "Run it again.")
    size = sum(_bytes_of(field) for field in fields)
    lengths = {len(data) for data in found.values()}
    if lengths != {size}:
        raise EngineError(f"answers in LoadGen's accuracy log have {sorted(lengths)} bytes, expected {size}.")
    whole = bytearray().join(found[row] for row in range(rows))
    table = torch.frombuffer(whole, dtype=torch.uint8).reshape(rows, size)
    answers, start = {}, 0
    for field in fields:
        stop = start + _bytes_of(field)
        column = table[:, start:stop].contiguous().view(_dtype(field))
        answers[field.name] = column.reshape(rows, *field.shape)
        start = stop
    return answers


def _by_sample(path: Path) -> dict[int, bytes]:
    """The bytes by sample; a sample that filled up the last query was answered twice, and any of them counts."""
    try:
        entries: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))
        return {int(entry["qsl_idx"]): bytes.fromhex(entry["data"]) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(f"LoadGen's accuracy log {path} cannot be read: {error}.", "Run it again.") from error


def _dtype(field: AnswerField) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, field.dtype)
    return dtype


def _bytes_of(field: AnswerField) -> int:
    count = 1
    for size in field.shape:
        count *= size
    return count * _dtype(field).itemsize

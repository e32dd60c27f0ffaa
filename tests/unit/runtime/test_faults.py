"""What is a lost device, and what only a call that was refused."""

from __future__ import annotations

import pytest
import torch

from onecard.runtime.faults import is_device_lost, is_out_of_memory


def error(text: str, code: int | None = None) -> torch.AcceleratorError:
    made = torch.AcceleratorError(f"CUDA error: {text}")
    if code is not None:
        made.error_code = code  # type: ignore[attr-defined]  # as PyTorch sets it
    return made


@pytest.mark.parametrize(
    "found",
    [
        error("an illegal memory access was encountered", 700),
        error("unspecified launch failure"),
        error("uncorrectable ECC error encountered", 214),
    ],
)
def test_a_device_that_faulted_is_lost(found):
    assert is_device_lost(found)


@pytest.mark.parametrize(
    "found",
    [
        error("operation not permitted when stream is capturing"),
        error("operation not permitted when stream is capturing", 900),
        error("operation failed due to a previous error during capture"),
        error("invalid argument", 1),
        error("no kernel image is available for execution on the device", 209),
        error("out of memory", 2),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
    ],
)
def test_a_call_that_was_refused_leaves_the_device(found):
    assert not is_device_lost(found)


def test_memory_is_short_whoever_says_so():
    assert is_out_of_memory(error("out of memory", 2))
    assert is_out_of_memory(RuntimeError("std::bad_alloc"))
    assert not is_out_of_memory(error("invalid argument", 1))

"""What a failure means: memory was short, the device is lost, or the model could not answer this input."""

from __future__ import annotations

import torch

from onecard.errors import DeviceMemoryError, EngineError
from onecard.models.wording import first_line
from onecard.spec import Bucket, bucket_label

_PASSING_CODES = frozenset({1, 98, 209, 400, 801, *range(900, 909)})
"""CUDA errors that leave the device as it was: a call that was refused (an argument, a kernel or a handle that does not
fit), and what is not permitted while a graph is recorded."""
_MEMORY_WORDS = ("out of memory", "cannot allocate memory", "bad_alloc", "failed to allocate", "bad allocation")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was short, whichever engine it comes from."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return any(words in text for words in _MEMORY_WORDS)


def is_device_lost(error: BaseException) -> bool:
    """Whether the device can do nothing more for this process: CUDA reports one fault for ever after."""
    if not isinstance(error, torch.AcceleratorError) or is_out_of_memory(error):
        return False
    return getattr(error, "error_code", None) not in _PASSING_CODES and "captur" not in str(error)


def too_large(size: Bucket, error: BaseException) -> DeviceMemoryError:
    """For the callers of a batch that does not fit, when there is no smaller one."""
    mistake = DeviceMemoryError(
        f"the model does not fit in memory at {bucket_label(size)}, and no smaller batch is left to try.",
        "Free memory on the device, or see what would fit with onecard plan.",
    )
    mistake.__cause__ = error
    return mistake


def again(error: EngineError) -> EngineError:
    """The same error, for one caller more: one object for all would hold every frame that it was raised in."""
    fresh = type(error)(error.message, error.cure)
    fresh.__cause__ = error
    return fresh


def explained(error: BaseException) -> EngineError:
    """For the callers of a batch that failed."""
    if isinstance(error, EngineError):
        return error
    mistake = EngineError(f"the model failed on this input: {first_line(error)}.")
    mistake.__cause__ = error
    return mistake

"""What a failure means: memory was short, the device is lost, or the model could not answer this input."""

from __future__ import annotations

import torch

from onecard.errors import DeviceMemoryError, EngineError
from onecard.models.wording import first_line
from onecard.spec import Bucket, bucket_label

_MEMORY_WORDS = ("out of memory", "cannot allocate memory", "bad_alloc", "failed to allocate", "bad allocation")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was short, whichever engine it comes from."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return any(words in text for words in _MEMORY_WORDS)


def is_device_lost(error: BaseException) -> bool:
    """Whether the device can do nothing more for this process: CUDA reports one fault for ever after."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


def too_large(size: Bucket, error: Exception) -> DeviceMemoryError:
    """For the callers of a batch that does not fit, when there is no smaller one."""
    mistake = DeviceMemoryError(
        f"the model does not fit in memory at {bucket_label(size)}, and no smaller batch is left to try.",
        "Free memory on the device, or see what would fit with onecard plan.",
    )
    mistake.__cause__ = error
    return mistake


def explained(error: Exception) -> EngineError:
    """For the callers of a batch that failed."""
    if isinstance(error, EngineError):
        return error
    mistake = EngineError(f"the model failed on this input: {first_line(error)}.")
    mistake.__cause__ = error
    return mistake

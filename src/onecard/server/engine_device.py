"""Memory of the device that one front's clients share: inputs that are read there, outputs that are written there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from onecard.errors import UsageError
from onecard.ipc.messages import CloseRegion, Done, OpenRegion
from onecard.ipc.tensors import Target, Tensor
from onecard.runtime.slots import Array
from onecard.server.cuda_regions import CudaRegions, OpenMemory
from onecard.server.engine_refusals import failed
from onecard.spec import DTYPES


class DeviceMemory:
    """The regions of one front.

    Args:
        open_memory: opens a handle; None for CUDA's.
    """

    def __init__(self, open_memory: OpenMemory | None = None) -> None:
        self._regions = CudaRegions(open_memory)

    def open(self, asked: OpenRegion) -> Done:
        """Open a region."""
        return self._carried_out(
            asked.call, lambda: self._regions.register(asked.name, asked.handle, asked.device, asked.byte_size)
        )

    def close(self, asked: CloseRegion) -> Done:
        """Forget a region."""
        return self._carried_out(asked.call, lambda: self._regions.unregister(asked.name))

    def release(self) -> None:
        """The front is gone."""
        self._regions.close()

    def input(self, tensor: Tensor) -> torch.Tensor:
        """An input where it lies.

        Raises:
            UsageError: there is no such place.
        """
        if tensor.dtype not in DTYPES:
            raise UsageError(f"input '{tensor.name}' has dtype '{tensor.dtype[:32]}', expected {', '.join(DTYPES)}.")
        return self._regions.tensor(tensor.region, tensor.offset, getattr(torch, tensor.dtype), tensor.shape)

    def place(
        self, outputs: Mapping[str, Array], targets: Sequence[Target]
    ) -> tuple[Mapping[str, Array], tuple[Tensor, ...]]:
        """Write outputs to where they are wanted.

        Returns:
            The other outputs; and of those written, what they are.

        Raises:
            UsageError: there is no such output or place, or it is too small.
        """
        if not targets:
            return outputs, ()
        left, written = dict(outputs), []
        for target in targets:
            answer = left.pop(target.output, None)
            if answer is None:
                raise UsageError(f"there is no output '{target.output[:128]}' to write to shared memory.")
            tensor = torch.from_numpy(answer) if isinstance(answer, np.ndarray) else answer
            self._regions.write(target.region, target.offset, target.byte_size, tensor)
            dtype = str(tensor.dtype).removeprefix("torch.")
            written.append(Tensor(target.output, dtype, tuple(tensor.shape), target.offset, b"", target.region))
        return left, tuple(written)

    def _carried_out(self, call: int, what: Callable[[], Any]) -> Done:
        try:
            what()
        except Exception as error:  # whatever the driver says is the client's to know
            return failed(call, error, "the shared memory could not be opened")
        return Done(call)

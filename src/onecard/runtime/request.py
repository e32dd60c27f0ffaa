"""A request within the engine: its inputs checked once on the way in, its answers put together on the way out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onecard.errors import SpecError
from onecard.runtime.future import Receiver
from onecard.runtime.ingest import Ingest, check_ingests, model_shapes
from onecard.runtime.slots import Array
from onecard.runtime.work import Lengths
from onecard.spec import Spec

_MOST_SHAPES = 4096  # remembered; a client that sends ever new shapes must not fill the memory


class Request:
    """One caller's inputs and answer.

    Attributes:
        inputs: arrays on the host, as the caller gave them.
        receiver: who gets the answer.
        numpy: whether the caller gets NumPy arrays, as its inputs were.
        parts: answers of the slices that are back, by their first row.
        back: rows that are answered.
        queue_s: how long its first row waited.
    """

    __slots__ = ("back", "inputs", "numpy", "parts", "queue_s", "receiver")

    def __init__(self, inputs: dict[str, Array], receiver: Receiver, numpy: bool) -> None:
        self.inputs = inputs
        self.receiver = receiver
        self.numpy = numpy
        self.parts: dict[int, dict[str, np.ndarray[Any, Any]]] = {}
        self.back = 0
        self.queue_s = -1.0

    def whole(self, dtypes: Mapping[str, torch.dtype]) -> dict[str, Any]:
        """All parts, one behind the other, as what the caller gave: NumPy arrays, or tensors.

        Args:
            dtypes: of the outputs, since bfloat16 travels as int16.
        """
        if len(self.parts) == 1:
            (arrays,) = self.parts.values()
        else:
            ordered = [self.parts[start] for start in sorted(self.parts)]
            arrays = {name: np.concatenate([part[name] for part in ordered]) for name in ordered[0]}
        if not self.numpy:
            return {name: torch.from_numpy(array).view(dtypes[name]) for name, array in arrays.items()}
        rounded = [name for name in arrays if dtypes[name] == torch.bfloat16]
        wide = {name: torch.from_numpy(arrays[name]).view(torch.bfloat16).float().numpy() for name in rounded}
        return {**arrays, **wide}  # NumPy has no bfloat16; float32 holds it exactly


class Intake:
    """Checks requests against a spec; equal shapes are looked at once.

    Args:
        spec: what the model takes.
        ingest: inputs that may also come in another form.
    """

    def __init__(self, spec: Spec, ingest: Sequence[Ingest] = ()) -> None:
        self.spec = spec
        self._ingests = check_ingests(spec, ingest)
        self._batch = spec.batch_symbol
        self._others = tuple(name for name in spec.symbols if name != self._batch)
        self._inputs = {t.name: t for t in spec.inputs}
        self._seen: dict[Any, tuple[int, Lengths]] = {}

    def take(self, inputs: Mapping[str, Any]) -> tuple[dict[str, Array], int, Lengths, int, bool]:
        """Check a request.

        Args:
            inputs: arrays or tensors by name.

        Returns:
            The arrays on the host, contiguous; rows; lengths; bytes; and whether all of them were NumPy arrays.

        Raises:
            SpecError: a name, type, dtype or shape that does not fit; the message says what is expected.
        """
        arrays: dict[str, Array] = {}
        nbytes, numpy, key = 0, True, []
        for name, value in inputs.items():
            array = self._array(name, value)
            arrays[name] = array
            nbytes += array.nbytes
            numpy = numpy and isinstance(value, np.ndarray)
            key.append((name, array.shape, array.dtype))
        found = self._seen.get(tuple(key))
        if found is None:
            found = self._measure(arrays)
            if len(self._seen) >= _MOST_SHAPES:
                self._seen.clear()
            self._seen[tuple(key)] = found
        return arrays, found[0], found[1], nbytes, numpy

    def _array(self, name: str, value: Any) -> Array:
        if isinstance(value, np.ndarray):
            return value if value.flags.c_contiguous else np.ascontiguousarray(value)
        if isinstance(value, Tensor):
            tensor = value.detach()
            if tensor.device.type != "cpu":
                tensor = tensor.cpu()
            return tensor.contiguous()
        expected = self._inputs.get(name)
        raise SpecError(
            f"input '{name}' is a {type(value).__name__}, expected a NumPy array or a tensor"
            f"{f' ({expected})' if expected else ''}."
        )

    def _measure(self, arrays: dict[str, Array]) -> tuple[int, Lengths]:
        size = self.spec.bind(model_shapes(self.spec, self._ingests, arrays))
        rows = size[self._batch] if self._batch is not None else 1
        return rows, tuple(size[name] for name in self._others)

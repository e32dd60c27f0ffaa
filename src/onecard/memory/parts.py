"""From a prediction to the parts that memory goes to: what the shapes say, and allowances for what they do not."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from onecard.memory.figures import MemoryPart, Prediction
from onecard.spec import Bucket, Spec

_MIB = 1 << 20
_ENGINE_BYTES = 16 * _MIB  # what the first call on a CPU leaves behind: thread stacks, oneDNN's and BLAS's buffers
_KEPT_BY_MALLOC_BYTES = 64 * _MIB  # glibc trims its heap above twice its threshold for large blocks, at most 32 MiB
_CUBLAS_BYTES = 8 * _MIB + (128 << 10)  # PyTorch's default, :4096:2:16:8
_CUBLAS_HOPPER_BYTES = 32 * _MIB  # and from compute capability 9.0 on, :4096:8
_HOPPER = 9.0


@dataclass(frozen=True)
class Place:
    """What decides the allowances.

    Args:
        device: ``cpu`` or ``cuda:N``.
        capability: of the card, ``9.0``; empty on a CPU or where it is not known.
        depth: staging slots, each with room for one call's inputs and outputs.
    """

    device: str
    capability: str = ""
    depth: int = 3


def parts_of(prediction: Prediction, place: Place, graph_bytes: int = 0) -> tuple[MemoryPart, ...]:
    """Every part of what serving takes, in the order of :class:`MemoryPart`.

    Args:
        prediction: of one call.
        place: where it runs.
        graph_bytes: static buffers of CUDA graphs, of all sizes together.
    """
    parts = [
        MemoryPart("weights", prediction.weights_bytes),
        MemoryPart("inputs", prediction.inputs_bytes),
        MemoryPart("outputs", prediction.outputs_bytes),
        MemoryPart("activations", prediction.activations_bytes, f"{prediction.road}; {peak_text(prediction)}"),
        _workspace(prediction, place),
        MemoryPart("graphs", graph_bytes, "static inputs and outputs of all CUDA graphs"),
        _slack(prediction, place),
        *staging(prediction.inputs_bytes + prediction.answer_bytes, place),
    ]
    return tuple(part for part in parts if part.nbytes or part.name != "graphs")


def staging(slot_bytes: int, place: Place) -> tuple[MemoryPart, ...]:
    """What the slots take beside the one that runs.

    Args:
        slot_bytes: inputs and outputs of one call.
        place: has the number of slots.
    """
    nbytes = (place.depth - 1) * slot_bytes
    return (MemoryPart("staging", nbytes, f"{place.depth - 1} slots beside the one that runs"),) if nbytes else ()


def slot_bytes(spec: Spec, bucket: Bucket) -> int:
    """Inputs and outputs of one call as the spec has them; outputs of a size of their own are left out."""
    known = [t for t in (*spec.inputs, *spec.outputs) if all(isinstance(d, int) or d in bucket for d in t.shape)]
    return sum(math.prod(t.concrete(bucket)) * _itemsize(t.dtype) for t in known)


def _itemsize(dtype: str) -> int:
    bits = re.search(r"\d+$", dtype)
    return int(bits[0]) // 8 if bits else 1  # bool


def peak_text(prediction: Prediction) -> str:
    """Where the peak is, for people."""
    count = prediction.peak_tensors
    tensors = f"{count} tensor{'s' if count != 1 else ''}"
    return f"peak at {prediction.peak_layer}: {tensors}, {prediction.peak_bytes / _MIB:,.1f} MiB"


def _workspace(prediction: Prediction, place: Place) -> MemoryPart:
    if place.device == "cpu":
        return MemoryPart("workspace", _ENGINE_BYTES, "an allowance for the engine's own buffers")
    is_hopper = not place.capability or float(place.capability) >= _HOPPER
    products = (_CUBLAS_HOPPER_BYTES if is_hopper else _CUBLAS_BYTES) if prediction.has_products else 0
    # cuDNN copies what is not in the layout of its kernel into its workspace: at most all three tensors.
    note = "cuBLAS's buffer, and the largest convolution's tensors once more"
    return MemoryPart("workspace", products + prediction.convolution_bytes, note)


def _slack(prediction: Prediction, place: Place) -> MemoryPart:
    if place.device == "cpu":
        kept = min(prediction.outputs_bytes + prediction.activations_bytes, _KEPT_BY_MALLOC_BYTES)
        return MemoryPart("slack", kept, "an allowance for freed memory that the C library keeps")
    slack = max(0, prediction.reserved_bytes - prediction.live_bytes)
    return MemoryPart("slack", slack, "simulated: what PyTorch's allocator rounds up and cannot reuse")

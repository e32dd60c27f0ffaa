"""CUDA graphs over another backend: the launches of a whole call recorded once and replayed as one.

The artifact is the inner backend's own. Loading captures a graph per bucket with static input and output
buffers; a call copies the inputs in, replays, and hands out copies, so that no answer is ever overwritten.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from onecard.backends.base import Backend, Runner, Target, Tensors
from onecard.errors import Unsupported
from onecard.evidence import Verdict
from onecard.inputs import make_inputs
from onecard.models.flat import FlatModule
from onecard.models.wording import first_line

INNER = ("eager", "inductor", "torchscript")
_WARMUP_CALLS = 3  # before capture: lazy initialisation and library autotuning must not be recorded


class CudaGraphBackend:
    """``cudagraph.eager`` and ``cudagraph.inductor``: the mode names the inner backend."""

    def available(self, target: Target) -> Verdict | None:
        if target.device == "cpu":
            return Verdict("unavailable", "CUDA graphs need an NVIDIA GPU", "Run on a machine with one.")
        return _inner(target).available(_inner_target(target))

    def build(self, module: FlatModule, inputs: Tensors, folder: Path, target: Target) -> None:
        _inner(target).build(module, inputs, folder, _inner_target(target))

    def load(self, folder: Path, target: Target) -> Runner:
        if target.bucket is None:
            raise Unsupported("a CUDA graph serves one size only", "Use the static recipe.")
        return CudaGraphRunner(_inner(target).load(folder, _inner_target(target)), target)


class CudaGraphRunner:
    """One captured graph and its static buffers."""

    def __init__(self, inner: Runner, target: Target) -> None:
        self._inner = inner
        example = make_inputs(target.spec, target.bucket or {})
        self._inputs = {name: _buffer(target, name, tensor) for name, tensor in example.items()}
        self._graph = torch.cuda.CUDAGraph()
        pool, stream = _shared(target)
        stream.wait_stream(torch.cuda.current_stream(target.device))
        with torch.inference_mode():
            with torch.cuda.stream(stream):
                for _ in range(_WARMUP_CALLS):
                    inner(self._inputs)
            torch.cuda.current_stream(target.device).wait_stream(stream)
            try:
                # Entering gives back what warming up left behind. Other threads may serve meanwhile: only what this
                # one does must be fit to be recorded.
                with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    self._outputs: dict[str, Tensor] = inner(self._inputs)
            except RuntimeError as error:
                if "captur" not in str(error):
                    raise
                raise Unsupported(
                    "the model does something that a CUDA graph cannot record (it waits for the card, or allocates "
                    f"outside of PyTorch): {first_line(error)}"
                ) from error

    def __call__(self, inputs: Tensors) -> Tensors:
        for name, buffer in self._inputs.items():
            buffer.copy_(inputs[name], non_blocking=True)
        self._graph.replay()
        return {name: output.clone() for name, output in self._outputs.items()}

    def close(self) -> None:
        self._outputs = {}
        self._graph.reset()
        self._inner.close()


def _shared(target: Target) -> tuple[Any, torch.cuda.Stream]:
    """The memory pool and the stream that all graphs of one variant share: they never run at the same time.

    Not more than one variant, because two of them may; and because a pool is gone for good when its last graph is.
    """
    key = "cuda graph"
    if key not in target.memo:
        # Of another priority than all others, since PyTorch hands the 32 streams of each out in turn: a model that
        # serves must not be on the stream that is recorded.
        stream = torch.cuda.Stream(target.device, priority=-1)  # type: ignore[no-untyped-call]
        target.memo[key] = torch.cuda.graph_pool_handle(), stream
    shared: tuple[Any, torch.cuda.Stream] = target.memo[key]
    return shared


def _buffer(target: Target, name: str, example: Tensor) -> Tensor:
    """An input's static buffer, filled: a part of the one that all buckets share, since one graph runs at a time."""
    flat = target.memo.get(("cuda graph input", name))
    if flat is None or flat.numel() < example.nbytes:  # the largest bucket comes first, but not in every input
        flat = torch.empty(example.nbytes, dtype=torch.uint8, device=target.device)
        target.memo["cuda graph input", name] = flat
    buffer: Tensor = flat[: example.nbytes].view(example.dtype).view(example.shape)
    return buffer.copy_(example)


def _inner_target(target: Target) -> Target:
    recipe = msgspec.structs.replace(target.recipe, backend=target.recipe.mode, mode="")
    return dataclasses.replace(target, recipe=recipe)


def _inner(target: Target) -> Backend:
    from onecard.backends import get_backend

    if target.recipe.mode not in INNER:
        raise Unsupported(f"no CUDA graph over '{target.recipe.mode}'", f"The modes are {', '.join(INNER)}.")
    return get_backend(target.recipe.mode)

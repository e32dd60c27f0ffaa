"""Staging on a real card: the same batches as the simulated one's, graphs, registered memory, failures, the kernel."""

from __future__ import annotations

import gc
import itertools
from multiprocessing import shared_memory

import numpy as np
import pytest
import torch
from torch import Tensor

from onecard.kernels import normalize as kernel
from onecard.runtime.entries import Source
from onecard.runtime.staging import Flight
from onecard.runtime.staging_cuda import CudaOptions, CudaStage
from onecard.spec import Bucket, parse_spec
from tests.unit.runtime.staged_batches import INGESTS, SIZES, Batches, Scorer, same

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

DEVICE = "cuda:0"
MEAN, STD = (123.675, 116.28, 103.53, 0.0), (58.395, 57.12, 57.375, 255.0)


class OnCard(Scorer):
    def __init__(self) -> None:
        super().__init__()
        self.device = DEVICE


class Graphs(OnCard):
    """A CUDA graph per size: static buffers in, replayed on the current stream, copies out."""

    def __init__(self) -> None:
        super().__init__()
        self._graphs = {tuple(size.values()): self._capture(size) for size in SIZES}

    def _capture(self, size: Bucket) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor], dict[str, Tensor]]:
        inputs = {
            t.name: torch.zeros(t.concrete(size), dtype=getattr(torch, t.dtype), device=DEVICE)
            for t in self.spec.inputs
        }
        super().run(inputs, size)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = super().run(inputs, size)
        return graph, inputs, outputs

    def run(self, inputs: dict[str, Tensor], size: Bucket) -> dict[str, Tensor]:
        graph, buffers, outputs = self._graphs[tuple(size.values())]
        for name, buffer in buffers.items():
            buffer.copy_(inputs[name], non_blocking=True)
        graph.replay()
        return {name: output.clone() for name, output in outputs.items()}


class Wide:
    """A model of large rows, slow enough that everything else overtakes it."""

    def __init__(self, cycles: int = 0) -> None:
        self.spec, self.device, self.cycles = parse_spec(["x: float32[B,65536], B=1..32"]), DEVICE, cycles

    def run(self, inputs: dict[str, Tensor], size: Bucket) -> dict[str, Tensor]:
        if self.cycles:
            torch.cuda._sleep(self.cycles)
        return {"y": inputs["x"] * 2 + 1}


def landed(flight: Flight, expected: dict[str, Tensor]) -> bool:
    flight.wait()
    right = same(flight.outputs, expected)
    flight.release()
    return right


def wide_rows(value: float) -> list[Source]:
    return [Source({"x": torch.full((20, 65536), float(value))}, 0, 20)]


def wide_answer(value: float) -> dict[str, Tensor]:
    expected = torch.ones(32, 65536)
    expected[:20] = value * 2 + 1
    return {"y": expected}


@pytest.mark.parametrize("model", [OnCard, Graphs])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_every_batch_is_answered(model: type[OnCard], depth: int, seed: int) -> None:
    stage = CudaStage(model(), SIZES, INGESTS, CudaOptions(depth, timings=seed % 2 == 0, spin=seed == 3))
    batches = Batches(seed, lambda tensor: tensor.pin_memory())
    air: list[tuple[Flight, dict[str, Tensor]]] = []
    for _ in range(50):
        sources, rows, size, expected = batches.next()
        air.append((stage.launch(sources, rows, size), expected))
        if len(air) == depth:
            assert landed(*air.pop(0))
    assert all(landed(*flight) for flight in air)
    stage.close()


def test_a_launch_waits_for_nothing_and_copies_overtake_the_computation() -> None:
    stage = CudaStage(Wide(), [{"B": 32}])
    for value in range(6):  # everything is loaded and allocated
        assert landed(stage.launch(wide_rows(value), 20, {"B": 32}), wide_answer(value))
    stage._model.cycles = 400_000_000  # some 0.2 s each
    flights = [stage.launch(wide_rows(value), 20, {"B": 32}) for value in range(3)]
    last = flights[2]._slot.events
    last.copied_in.synchronize()
    assert not flights[0]._slot.events.computed.query(), "the third batch is there while the first computes"
    assert all(landed(flight, wide_answer(value)) for value, flight in enumerate(flights))
    assert min(flights[2].timings) > 0
    stage.close()


def test_registered_memory_is_read_in_place() -> None:
    shared = shared_memory.SharedMemory(create=True, size=32 * 65536 * 4)
    try:
        array = np.frombuffer(shared.buf, np.float32).reshape(32, 65536)
        array[:] = 3
        stage = CudaStage(Wide(), [{"B": 32}])
        assert stage.register(array)
        assert torch.from_numpy(array).is_pinned()
        sources = [Source({"x": array}, 4, 20)]
        assert landed(stage.launch(sources, 20, {"B": 32}), wide_answer(3))
        stage.unregister(array)
        assert not torch.from_numpy(array).is_pinned()
        assert landed(stage.launch(sources, 20, {"B": 32}), wide_answer(3))
        assert stage.register(array)
        stage.close()
        del array, sources, stage
        gc.collect()
    finally:
        shared.close()
        shared.unlink()


def test_memory_that_two_stages_registered_stays_so_until_both_are_done_with_it() -> None:
    array = np.full((32, 65536), 3, np.float32)
    first, second = CudaStage(Wide(), [{"B": 32}]), CudaStage(Wide(), [{"B": 32}])
    assert first.register(array) and second.register(array) and second.register(array)
    first.close()
    assert torch.from_numpy(array).is_pinned()
    assert landed(second.launch([Source({"x": array}, 0, 20)], 20, {"B": 32}), wide_answer(3))
    second.unregister(array)
    assert not torch.from_numpy(array).is_pinned()
    second.close()


def test_memory_that_cannot_be_registered_is_collected_and_breaks_nothing() -> None:
    array = np.full((32, 65536), 3, np.float32)
    stage = CudaStage(Wide(), [{"B": 32}])
    assert stage.register(array)
    assert not CudaStage(Wide(), [{"B": 32}]).register(array[1:])  # the driver refuses what overlaps
    assert landed(stage.launch([Source({"x": array}, 0, 20)], 20, {"B": 32}), wide_answer(3))
    stage.close()


def test_out_of_memory_costs_no_slot() -> None:
    class Greedy(Wide):
        greedy = False

        def run(self, inputs: dict[str, Tensor], size: Bucket) -> dict[str, Tensor]:
            if self.greedy:
                return {"y": torch.empty(1 << 50, dtype=torch.uint8, device=DEVICE)}
            return super().run(inputs, size)

    model = Greedy()
    stage = CudaStage(model, [{"B": 32}], (), CudaOptions(depth=2))
    for value in range(4):
        flight = stage.launch(wide_rows(value), 20, {"B": 32})
        model.greedy = True
        with pytest.raises(torch.OutOfMemoryError):
            stage.launch(wide_rows(9), 20, {"B": 32})
        model.greedy = False
        assert landed(flight, wide_answer(value))
    stage.close()


def test_closing_gives_the_memory_back() -> None:
    gc.collect()
    before = torch.cuda.memory_allocated()
    stage = CudaStage(Wide(), [{"B": 32}])
    assert torch.cuda.memory_allocated() - before >= 3 * 32 * 65536 * 4
    assert landed(stage.launch(wide_rows(1), 20, {"B": 32}), wide_answer(1))
    stage.close()
    del stage
    gc.collect()
    assert torch.cuda.memory_allocated() == before


SHAPES = [(2, 5, 7), (1, 1, 1), (2, 31, 67), (0, 4, 4), (64, 224, 224)]


@pytest.mark.parametrize(
    ("shape", "channels", "layout", "dtype"),
    list(itertools.product(SHAPES, (1, 3, 4), ("NHWC", "NCHW"), kernel.FLOATS)),
)
def test_the_kernel_gives_the_reference_to_the_bit(
    shape: tuple[int, int, int], channels: int, layout: str, dtype: torch.dtype
) -> None:
    assert kernel.triton is not None, "this torch came without triton"
    batch, height, width = shape
    order = (batch, height, width, channels) if layout == "NHWC" else (batch, channels, height, width)
    raw = torch.randint(0, 256, order, dtype=torch.uint8, device=DEVICE)
    raw = raw.permute(0, 3, 1, 2) if layout == "NHWC" else raw
    expected = torch.empty(raw.shape, dtype=dtype, device=DEVICE)
    kernel.normalize_reference(raw, MEAN[:channels], STD[:channels], expected)
    whole = torch.full((batch + 2, channels, height + 1, width + 3), 9.0, dtype=dtype, device=DEVICE)
    part = whole[1:-1, :, :height, :width]
    for out in (torch.empty_like(expected), torch.empty_like(expected, memory_format=torch.channels_last), part):
        kernel.normalize(raw, MEAN[:channels], STD[:channels], out)
        assert torch.equal(out, expected)
    part.fill_(9.0)
    assert whole.eq(9.0).all()


def test_the_kernel_reaches_beyond_two_gibibytes() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 20 << 30:
        pytest.skip(f"needs 20 GiB of free device memory, here are {free >> 30}")
    raw = torch.randint(0, 256, (750, 1000, 1000, 3), dtype=torch.uint8, device=DEVICE).permute(0, 3, 1, 2)
    out = torch.empty(raw.shape, dtype=torch.float16, device=DEVICE)
    kernel.normalize(raw, MEAN[:3], STD[:3], out)
    expected = torch.empty_like(out[-2:])
    kernel.normalize_reference(raw[-2:], MEAN[:3], STD[:3], expected)
    assert torch.equal(out[-2:], expected)

"""Random batches for stages: callers' arrays in every form that they may have, and what the model must answer."""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec
import numpy as np
import torch
from torch import Tensor

from onecard.runtime.entries import Source
from onecard.runtime.ingest import Cast, Picture
from onecard.spec import Bucket, Spec, TensorSpec, parse_spec

MEAN, STD = (100.0, 110.0, 120.0), (50.0, 60.0, 70.0)
INGESTS = (Picture("image", MEAN, STD), Cast("ids", "int32"))
SIZES: list[Bucket] = [{"B": 2, "S": 5}, {"B": 4, "S": 5}, {"B": 4, "S": 9}, {"B": 8, "S": 9}]


def make_spec() -> Spec:
    spec = parse_spec(["ids: int64[B,S], B=1..8, S=1..9", "image: float32[B,3,4,5]", "half: bfloat16[B,6]"])
    outputs = (
        TensorSpec("tokens", "float32", ("B", "S")),
        TensorSpec("mean", "float32", ("B",)),
        TensorSpec("echo", "float32", ("B", 3, 4, 5)),
        TensorSpec("tail", "float32", ("B", "tail_1")),
    )
    return msgspec.structs.replace(spec, outputs=outputs)


class Scorer:
    """Every output depends on every element of its row, and one is an input as it came."""

    def __init__(self) -> None:
        self.spec = make_spec()
        self.device = "cpu"
        self.before: Callable[[], None] = lambda: None

    def run(self, inputs: dict[str, Tensor], size: Bucket) -> dict[str, Tensor]:
        self.before()
        ids, image, half = inputs["ids"], inputs["image"], inputs["half"]
        assert tuple(ids.shape) == (size["B"], size["S"])
        tokens = (ids * 3 + 1).float() + half.float().sum(1, keepdim=True)
        mean = image.mean((1, 2, 3)) + ids.float().sum(1)
        tail = (ids.float()[:, : size["S"] // 2 + 1] * mean[:, None]).t()  # not contiguous
        return {"tokens": tokens, "mean": mean, "echo": image, "tail": tail.t()}


class Captured(Scorer):
    """As a CUDA graph does it: static buffers in, answers copied from static buffers."""

    def __init__(self) -> None:
        super().__init__()
        self._static: dict[tuple[int, ...], tuple[dict[str, Tensor], dict[str, Tensor]]] = {}

    def run(self, inputs: dict[str, Tensor], size: Bucket) -> dict[str, Tensor]:
        key = tuple(size.values())
        if key not in self._static:
            buffers = {name: torch.zeros_like(tensor) for name, tensor in inputs.items()}
            self._static[key] = buffers, super().run(buffers, size)
        buffers, outputs = self._static[key]
        for name, buffer in buffers.items():
            buffer.copy_(inputs[name], non_blocking=True)
        for name, fresh in super().run(buffers, size).items():
            outputs[name].copy_(fresh)
        return {name: output.clone() for name, output in outputs.items()}


class Batches:
    """Batches of a seed.

    Args:
        seed: equal seeds give equal batches.
        pin: makes a tensor one that the card reads by itself.
    """

    def __init__(self, seed: int, pin: Callable[[Tensor], Tensor]) -> None:
        self._random = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._pin = pin

    def next(self) -> tuple[list[Source], int, Bucket, dict[str, Tensor]]:
        """Sources, rows, the size to run at, and what the model must answer to it, padding included."""
        size = self._random.choice(SIZES)
        rows = self._random.randint(1, size["B"])
        expected = {
            "ids": torch.zeros(size["B"], size["S"], dtype=torch.int64),
            "image": torch.zeros(size["B"], 3, 4, 5),
            "half": torch.zeros(size["B"], 6, dtype=torch.bfloat16),
        }
        sources: list[Source] = []
        row = 0
        while row < rows:
            count = self._random.choice([rows - row, self._random.randint(1, rows - row)])
            length = self._random.choice([size["S"], self._random.randint(1, size["S"])])
            sources.append(self._source(row, count, length, expected))
            row += count
        return sources, rows, size, Scorer().run(expected, size)

    def _source(self, row: int, rows: int, length: int, expected: dict[str, Tensor]) -> Source:
        start, after = self._random.choice([0, 0, 2]), self._random.choice([0, 0, 1])
        total = start + rows + after
        ids = torch.randint(-1000, 1000, (total, length), generator=self._generator)
        image = torch.randn(total, 3, 4, 5, generator=self._generator)
        half = torch.randn(total, 6, generator=self._generator).bfloat16()
        raw = torch.randint(0, 256, (total, 4, 5, 3), dtype=torch.uint8, generator=self._generator)
        mine, there = slice(start, start + rows), slice(row, row + rows)
        inputs = {"half": self._pin(half) if self._random.random() < 0.5 else half}
        expected["half"][there] = half[mine]
        expected["ids"][there, :length] = ids[mine]
        inputs["ids"] = self._form(ids.int() if self._random.random() < 0.3 else ids)
        if self._random.random() < 0.5:
            image = (raw.permute(0, 3, 1, 2) - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
            inputs["image"] = self._form(raw)
        else:
            inputs["image"] = self._form(image)
        expected["image"][there] = image[mine]
        return Source(inputs, start, rows)

    def _form(self, tensor: Tensor) -> Tensor | np.ndarray:
        """The same numbers as some caller might hold them."""
        form = self._random.randrange(7)
        if form == 0:
            return self._pin(tensor)
        if form == 1:
            return tensor
        if form == 2:
            return tensor.transpose(0, -1).contiguous().transpose(0, -1)
        array = tensor.numpy()
        if form == 3:
            return array
        if form == 4:
            return np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)  # read-only
        if form == 5:
            return np.frombuffer(b"x" + array.tobytes(), array.dtype, offset=1).reshape(array.shape)  # not aligned
        return np.ascontiguousarray(array[::-1])[::-1]  # a negative stride


def same(outputs: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return outputs.keys() == expected.keys() and all(
        outputs[name].dtype == tensor.dtype
        and outputs[name].shape == tensor.shape
        and torch.allclose(outputs[name], tensor, rtol=1e-4, atol=1e-4)
        for name, tensor in expected.items()
    )

"""Backends that go wrong in every way that an engine can, for the search to survive."""

from __future__ import annotations

import os
import signal
import time

import torch

from onecard.backends.base import Runner, Target, Tensors
from onecard.backends.eager import EagerBackend
from onecard.evidence import Verdict


class _Hostile(EagerBackend):
    """Builds like eager; subclasses spoil the loading or the answers."""

    def available(self, target: Target) -> Verdict | None:
        return None


class Segfaults(_Hostile):
    def load(self, folder, target) -> Runner:
        os.kill(os.getpid(), signal.SIGSEGV)
        raise AssertionError("not reached")


class Hangs(_Hostile):
    def load(self, folder, target) -> Runner:
        time.sleep(3600)
        raise AssertionError("not reached")


class EatsMemory(_Hostile):
    def load(self, folder, target) -> Runner:
        hoard = []
        while True:
            hoard.append(b"x" * (32 << 20))
            time.sleep(0.01)


class Raises(_Hostile):
    def build(self, module, inputs, folder, target) -> None:
        raise ValueError("operator aten::frobnicate is not known")


class OutOfMemory(_Hostile):
    def load(self, folder, target) -> Runner:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB")


class Unavailable(_Hostile):
    def available(self, target: Target) -> Verdict | None:
        return Verdict("unavailable", "frobnicator is not installed", "pip install frobnicator")


class _Spoiled:
    def __init__(self, inner: Runner) -> None:
        self.inner = inner
        self.kept: Tensors = {}

    def close(self) -> None:
        self.inner.close()


class Scaled(_Hostile):
    """Every answer five per cent too large."""

    def load(self, folder, target) -> Runner:
        inner = super().load(folder, target)

        class Spoiled(_Spoiled):
            def __call__(self, inputs):
                return {k: v * 1.05 for k, v in self.inner(inputs).items()}

        return Spoiled(inner)


class FirstRowOnly(_Hostile):
    """Right in row 0, which is also every answer of batch 1."""

    def load(self, folder, target) -> Runner:
        inner = super().load(folder, target)

        class Spoiled(_Spoiled):
            def __call__(self, inputs):
                out = {k: v.clone() for k, v in self.inner(inputs).items()}
                for tensor in out.values():
                    tensor[1:] = tensor[0]
                return out

        return Spoiled(inner)


class SwapsRows(_Hostile):
    """Two callers of one batch get each other's answers."""

    def load(self, folder, target) -> Runner:
        inner = super().load(folder, target)

        class Spoiled(_Spoiled):
            def __call__(self, inputs):
                return {k: v.flip(0) for k, v in self.inner(inputs).items()}

        return Spoiled(inner)


class ReusesBuffer(_Hostile):
    """Hands out the same memory for every answer of a size, as a naive CUDA graph does."""

    def load(self, folder, target) -> Runner:
        inner = super().load(folder, target)

        class Spoiled(_Spoiled):
            def __call__(self, inputs):
                out = {}
                for name, value in self.inner(inputs).items():
                    key = f"{name}{tuple(value.shape)}"
                    out[name] = self.kept.setdefault(key, torch.empty_like(value)).copy_(value)
                return out

        return Spoiled(inner)

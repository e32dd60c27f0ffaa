"""AOTInductor: the exported program compiled ahead of time into a package that needs no Python model."""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onecard.backends.base import Target, Tensors
from onecard.backends.export import export_program, quiet_export
from onecard.errors import Unsupported
from onecard.evidence import Verdict
from onecard.models.flat import FlatModule
from onecard.models.wording import first_line

_FILE = "model.pt2"
_CACHE_VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
_CPU_OPTIONS: dict[str, Any] = {"freezing": True, "cpp.weight_prepack": True}
"""Without freezing, convolutions and matrix products reorder their weights in every call."""


class AotiBackend:
    """``torch._inductor.aoti_compile_and_package``; one package serves the whole range, or one bucket."""

    def available(self, target: Target) -> Verdict | None:
        if target.device == "cpu" and not any(map(shutil.which, ("g++", "clang++", os.environ.get("CXX", "g++")))):
            return Verdict("unavailable", "AOTInductor needs a C++ compiler", "Install g++ or set CXX.")
        if target.device != "cpu" and importlib.util.find_spec("triton") is None:
            return Verdict("unavailable", "AOTInductor needs Triton on a GPU", "pip install triton")
        return None

    def build(self, module: FlatModule, inputs: Tensors, folder: Path, target: Target) -> None:
        program = export_program(module, inputs, target)
        options = _CPU_OPTIONS if target.device == "cpu" else {}
        path = str(folder / _FILE)
        with quiet_export(), _caches_in(target.work):
            try:
                torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=options)
            except Exception as error:  # code generation, the C++ compiler, Triton: all mean the same here
                raise Unsupported(f"AOTInductor cannot compile this model: {first_line(error)}") from error

    def load(self, folder: Path, target: Target) -> AotiRunner:
        index = torch.device(target.device).index
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            package = torch._inductor.aoti_load_package(
                str(folder / _FILE), device_index=-1 if index is None else index
            )
        return AotiRunner(package, target)


class AotiRunner:
    """A loaded package, called below its argument-tree handling: the flat convention has no tree."""

    def __init__(self, package: Any, target: Target) -> None:
        self._run: Any = package.loader.boxed_run
        self._package: Any = package
        self._inputs = tuple(t.name for t in target.spec.inputs)
        self._outputs = tuple(t.name for t in target.spec.outputs)

    def __call__(self, inputs: Tensors) -> Tensors:
        with torch.inference_mode():
            answer: list[Tensor] = self._run([inputs[name] for name in self._inputs])
        return dict(zip(self._outputs, answer, strict=True))

    def close(self) -> None:
        self._run = self._package = None


@contextmanager
def _caches_in(work: Path | None) -> Iterator[None]:
    """Let the compilers keep their caches in the candidate's own folder, for this time only."""
    before = {name: os.environ.get(name) for name in _CACHE_VARIABLES}
    if work is not None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(work / "inductor")
        os.environ["TRITON_CACHE_DIR"] = str(work / "triton")
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

"""TorchScript: traced or scripted, frozen, and on a CPU fused for inference when it is loaded.

``model.ts`` is TorchScript's own archive, read by its C++ loader; Python's unpickler never sees it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onecard.backends.base import Target, Tensors
from onecard.backends.export import example_args, is_bare
from onecard.errors import Unsupported, UsageError
from onecard.evidence import Verdict
from onecard.models.flat import FlatModule, named_leaves
from onecard.models.wording import first_line

_jit: Any = torch.jit  # largely untyped, and deprecated as a whole
MODES = ("trace", "script")
_FILE = "model.ts"


class TorchScriptBackend:
    """``torch.jit.trace`` (mode ``trace``, the default) or ``torch.jit.script`` (mode ``script``)."""

    def available(self, target: Target) -> Verdict | None:
        _mode(target)
        return None

    def build(self, module: FlatModule, inputs: Tensors, folder: Path, target: Target) -> None:
        with _quiet(), torch.inference_mode(False), torch.no_grad():
            try:
                if _mode(target) == "script":
                    program = _scripted(module)
                else:
                    program = _jit.trace(module, example_args(inputs, target), check_trace=False, strict=False)
                _jit.save(_jit.freeze(program.eval()), str(folder / _FILE))
            except Unsupported:
                raise
            except Exception as error:  # any error of the model's own code may surface here
                raise Unsupported(f"TorchScript cannot take this model: {first_line(error)}") from error

    def load(self, folder: Path, target: Target) -> TorchScriptRunner:
        with _quiet(), torch.no_grad():
            program = _jit.load(str(folder / _FILE), map_location=target.device)
            if target.device == "cpu" and target.recipe.precision == "fp32":
                # Here and not in build: it packs weights into oneDNN tensors, which cannot be saved.
                program = _jit.optimize_for_inference(program)
        return TorchScriptRunner(program, target)


class TorchScriptRunner:
    """A loaded TorchScript program."""

    def __init__(self, program: Any, target: Target) -> None:
        self._program = program
        self._inputs = tuple(t.name for t in target.spec.inputs)
        self._outputs = tuple(t.name for t in target.spec.outputs)

    def __call__(self, inputs: Tensors) -> Tensors:
        with torch.inference_mode():
            answer = self._program(*[inputs[name] for name in self._inputs])
        leaves = [leaf for _, leaf in named_leaves(answer)]
        return dict(zip(self._outputs, leaves, strict=True))

    def close(self) -> None:
        self._program = _closed


def _closed(*_: Tensor) -> Tensor:
    raise RuntimeError("this runner is closed")


def _mode(target: Target) -> str:
    mode = target.recipe.mode or MODES[0]
    if mode not in MODES:
        raise UsageError(f"unknown mode '{mode}' of torchscript: expected one of {', '.join(MODES)}.")
    return mode


def _scripted(module: FlatModule) -> Any:
    """Script the original itself: the flat module around it is Python that cannot be scripted."""
    if not (module.plan.is_plain and is_bare(module)):
        raise Unsupported(
            "scripting needs a model that takes just its tensors by position, in fp32 and its own layout",
            "Use torchscript.trace.",
        )
    return _jit.script(module.inner)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the notices that torch.jit is deprecated, and that a trace is only as good as its example.

    The first cannot be acted on; the second is what verification is for.
    """
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", message=r".*torch\.(jit|_jit|_C).*", category=category)
        warnings.simplefilter("ignore", _jit.TracerWarning)
        yield

"""The backends, by name. The table holds strings, so that listing them imports none."""

from __future__ import annotations

import importlib
import os
from typing import cast

from onecard.backends.base import Backend
from onecard.errors import UsageError

BACKENDS = {
    "eager": "onecard.backends.eager:EagerBackend",
    "torchscript": "onecard.backends.torchscript:TorchScriptBackend",
    "inductor": "onecard.backends.inductor:InductorBackend",
    "aoti": "onecard.backends.aoti:AotiBackend",
    "cudagraph": "onecard.backends.cudagraph:CudaGraphBackend",
    "onnxruntime": "onecard.backends.onnxruntime:OnnxRuntimeBackend",
    "openvino": "onecard.backends.openvino:OpenVinoBackend",
    "tensorrt": "onecard.backends.tensorrt:TensorRtBackend",
    "stream": "onecard.backends.stream:StreamBackend",
}


PLUGINS_VARIABLE = "ONECARD_BACKENDS"


def plugins() -> dict[str, str]:
    """Backends of the user's own: ``ONECARD_BACKENDS="name=module:Class,..."``; each is tried in every search."""
    pairs = (entry.partition("=") for entry in os.environ.get(PLUGINS_VARIABLE, "").split(",") if entry)
    return {name.strip(): target.strip() for name, _, target in pairs}


def get_backend(name: str) -> Backend:
    """Import one backend and make it.

    Raises:
        UsageError: there is no backend of that name.
    """
    table = {**BACKENDS, **plugins()}
    if name not in table:
        raise UsageError(f"unknown backend '{name}': expected one of {', '.join(table)}.")
    module, _, attribute = table[name].partition(":")
    return cast(Backend, getattr(importlib.import_module(module), attribute)())

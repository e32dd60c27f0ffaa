"""The backends, by name. The table holds strings, so that listing them imports none."""

from __future__ import annotations

import importlib
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
}


def get_backend(name: str) -> Backend:
    """Import one backend and make it.

    Raises:
        UsageError: there is no backend of that name.
    """
    if name not in BACKENDS:
        raise UsageError(f"unknown backend '{name}': expected one of {', '.join(BACKENDS)}.")
    module, _, attribute = BACKENDS[name].partition(":")
    return cast(Backend, getattr(importlib.import_module(module), attribute)())

"""A model between the server's processes: how the engine is to open it, and how it has it."""

from __future__ import annotations

from typing import Any

import msgspec

from onecard.spec import Spec, TensorSpec

SENTINEL_DEVICES = ("cpu", "same")
"""Where a sentinel's original may run: on the processor, or where the model does."""


class ModelOptions(msgspec.Struct, frozen=True):
    """How the engine opens a model: what the command line said, over what ``onecard tune`` wrote into the bundle.

    Args:
        device: ``auto``, ``cpu``, ``cuda:0`` ...
        p99_ms: take the setting that was tuned for this limit.
        policy: fields of :class:`onecard.runtime.limits.BatchPolicy` to replace.
        timeout_s: deadline of requests that name none.
        ingest: inputs that may also come in another form, in the words of :mod:`onecard.runtime.ingest_text`, those
            of ``MODEL:`` for that model alone; empty for those that ``onecard tune --ingest`` wrote into the bundle.
        device_memory: most bytes of the device's memory for this model.
        sentinel: one request in so many is answered again by the original, see :mod:`onecard.runtime.sentinel`; 0 is
            none.
        sentinel_device: where the original runs, one of :data:`SENTINEL_DEVICES`; empty for ``cpu``.
    """

    device: str = "auto"
    p99_ms: float | None = None
    policy: dict[str, Any] = {}
    timeout_s: float | None = None
    ingest: tuple[str, ...] = ()
    device_memory: int | None = None
    sentinel: int = 0
    sentinel_device: str = ""


class ModelState(msgspec.Struct, frozen=True):
    """One model as the engine has it.

    Args:
        name: in the URL.
        version: 1, and one more after each reload.
        state: READY, LOADING, UNLOADING or UNAVAILABLE.
        reason: for the state.
        path: of the bundle that serves; empty if none does.
        spec: of its inputs and outputs; None if none serves.
        device: where it runs.
        ingest: the further forms of its inputs that it takes, named as they are.
    """

    name: str
    version: str
    state: str
    reason: str = ""
    path: str = ""
    spec: Spec | None = None
    device: str = ""
    ingest: tuple[TensorSpec, ...] = ()

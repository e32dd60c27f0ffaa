"""A bundle in this process, through the engine: what the model and the batcher do without a network."""

from __future__ import annotations

import asyncio
import contextlib
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onecard.bench.records import ANSWERED, FAILED, REFUSED
from onecard.bench.target import Done, Inputs
from onecard.errors import EngineError

if TYPE_CHECKING:
    from onecard.runtime.engine import Engine
    from onecard.runtime.future import Answer

_UNAVAILABLE = (429, 503)


class EngineTarget:
    """An open engine; it is closed with the target.

    Args:
        engine: of the bundle.
        about: what to say of it.
    """

    def __init__(self, engine: Engine, about: dict[str, str]) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self.spec = engine.spec
        self.about = {"protocol": "in process, no network", "device": engine.device, **about}
        self.said = ""

    def prepare(self, inputs: Inputs) -> dict[str, Any]:
        dtypes = {tensor.name: tensor.dtype for tensor in self.spec.inputs}
        return {name: _as_bfloat16(a) if dtypes[name] == "bfloat16" else a for name, a in inputs.items()}

    def send(self, request: dict[str, Any], done: Done) -> None:
        try:
            answer = self._engine.submit(request)
        except EngineError as error:
            self._loop.call_soon(done, self._outcome(error), time.perf_counter())
            return
        answer.add_done_callback(partial(self._deliver, done))

    async def close(self) -> None:
        await self._loop.run_in_executor(None, self._engine.close, 0.0)

    def _deliver(self, done: Done, answer: Answer) -> None:
        """On a thread of the engine: what is timed is the answer, not when the loop hears of it."""
        when = time.perf_counter()
        error = None if answer.cancelled() else answer.exception()
        outcome = ANSWERED if error is None else self._outcome(error)
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(done, outcome, when)

    def _outcome(self, error: BaseException) -> str:
        self.said = self.said or str(error)
        refused = isinstance(error, EngineError) and error.http_status in _UNAVAILABLE
        return f"{REFUSED if refused else FAILED}{type(error).__name__}"


def _as_bfloat16(bits: Any) -> Any:
    import torch

    return torch.from_numpy(bits).view(torch.bfloat16)


def open_engine(bundle: Path, device: str = "auto") -> Engine:
    """Open a bundle, with the settings that ``onecard tune`` found if it ran; before there is an event loop to block.

    Raises:
        BundleError: it is damaged.
        NoVariantError: nothing of it runs here.
    """
    from onecard.runtime.engine import Engine

    return Engine.open(bundle, device)

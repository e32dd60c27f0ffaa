"""The server at one moment: what its processes count and its sensors say, put together for whoever watches it."""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from msgspec import UNSET

from onecard import __version__
from onecard.errors import OnecardError
from onecard.ipc.messages import Told
from onecard.server.engine_figures import decode_figures
from onecard.server.engine_served import ServedModel
from onecard.server.http_types import LOGGER
from onecard.server.oip_types import DATATYPES
from onecard.server.request_figures import RequestFigures
from onecard.server.serving import Serving
from onecard.spec import TensorSpec
from onecard.telemetry.card_reader import read_card
from onecard.telemetry.card_sample import card_state
from onecard.telemetry.cpu_processes import ProcessTree
from onecard.telemetry.processes import read_process
from onecard.telemetry.sampler import Sampler
from onecard.telemetry.snapshot import (
    ModelFigures,
    Sensors,
    ServerFigures,
    Snapshot,
    TensorFigures,
    merge,
)

_PATIENCE_S = 2.0  # an engine that does not answer by then is left out
_FRESH_S = 0.2  # those who ask at the same time get the same


@dataclass(frozen=True)
class Life:
    """What only the process that owns the engine knows.

    Args:
        restarts: how often the engine was started again.
        engine_pid: of the engine; None while there is none.
        connections: open ones, of all ways in.
        fronts: processes with sockets.
    """

    restarts: Callable[[], int]
    engine_pid: Callable[[], int | None]
    connections: Callable[[], int]
    fronts: Callable[[], int] = lambda: 1


class Watched:
    """Reads the whole server.

    Args:
        serving: the models.
        life: of its processes.
        role: of this process.
        others: what the other fronts tell.
    """

    def __init__(
        self,
        serving: Serving,
        life: Life,
        role: str = "front",
        others: Callable[[], Awaitable[Sequence[Snapshot]]] | None = None,
    ) -> None:
        self._serving = serving
        self._life = life
        self._role = role
        self._others = others
        self._started_s = time.time()
        self._platform = f"{platform.system()} {platform.machine()}"
        self._samplers: dict[str, Sampler] = {}
        self._reading: asyncio.Task[Snapshot] | None = None
        self._newest: tuple[float, Snapshot] | None = None

    async def read(self) -> Snapshot:
        """The state now, or of a fifth of a second ago; it does not fail if the engine is away."""
        if self._newest is not None and time.monotonic() - self._newest[0] < _FRESH_S:
            return self._newest[1]
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read())
        return await asyncio.shield(self._reading)

    def bundle_of(self, name: str) -> Path:
        """The folder of the bundle that serves under a name.

        Raises:
            HttpError: 404, there is no such model; 503, it does not serve now.
        """
        model, _ = self._serving.find(name)
        return Path(model.path)

    def watch(self) -> None:
        """Begin to read the sensors of the devices that models run on, and of the processor."""
        devices = {model.device for model in self._serving.client.models.values() if model.device}
        for device in sorted({"cpu", *devices}):
            if device not in self._samplers:
                try:
                    self._samplers[device] = Sampler(read_card(device, tree=ProcessTree()))
                except OnecardError as error:
                    LOGGER.warning("%s is not watched: %s", device, error)

    def close(self) -> None:
        """Stop reading sensors."""
        for sampler in self._samplers.values():
            sampler.close()
        self._samplers.clear()

    async def _read(self) -> Snapshot:
        await asyncio.get_running_loop().run_in_executor(None, self.watch)
        others = asyncio.ensure_future(self._others()) if self._others is not None else None
        told: Told | None = None
        try:
            told = await asyncio.wait_for(self._serving.client.ask(), _PATIENCE_S)
        except (OnecardError, asyncio.TimeoutError) as error:
            LOGGER.debug("the engine's figures are not known: %s", error)
        parts = [self.part(), *(await others if others is not None else ())]
        if told is not None:
            known = {(model.name, model.version) for model in parts[0].models}
            figures = [model for model in decode_figures(told.figures) if (model.name, model.version) in known]
            parts.append(Snapshot(time_s=time.time(), models=tuple(figures)))
        snapshot = merge(parts)
        self._newest = time.monotonic(), snapshot
        return snapshot

    def part(self) -> Snapshot:
        """What this process knows without asking another."""
        serving, life = self._serving, self._life
        server = ServerFigures(
            version=__version__,
            started_s=self._started_s,
            ready=serving.is_ready,
            engine_restarts=life.restarts(),
            open_connections=life.connections(),
            fronts=life.fronts(),
            platform=self._platform,
        )
        models = tuple(figures for model in serving.client.models.values() for figures in self._models(model))
        pid = life.engine_pid()
        processes = (read_process(self._role), None if pid is None else read_process("engine", pid))
        card = next((name for name in self._samplers if name != "cpu"), "cpu")
        return Snapshot(
            time_s=time.time(),
            server=server,
            models=models,
            card=self._sensors(card),
            host=UNSET if card == "cpu" else self._sensors("cpu"),
            processes=tuple(process for process in processes if process is not None),
        )

    def _models(self, model: ServedModel) -> list[ModelFigures]:
        """The version that serves; one that it replaced only while requests of it are open."""
        spec = None if model.contract is None else model.contract.spec
        book = self._serving.client.book.versions(model.name)
        found = []
        for version, figures in {model.version: RequestFigures(), **book}.items():
            serves = version == model.version
            if not serves and not figures.open:
                continue
            found.append(
                ModelFigures(
                    name=model.name,
                    version=version,
                    state=model.state if serves else "UNLOADING",
                    reason=model.reason if serves else "",
                    device=model.device,
                    inputs=() if spec is None else tuple(map(_tensor, spec.inputs)),
                    outputs=() if spec is None else tuple(map(_tensor, spec.outputs)),
                    in_flight=figures.open,
                    admitted=figures.admitted,
                    requests=figures.seconds.copy().count,
                    failures=dict(figures.failures),
                    histograms={"request_s": figures.seconds.copy()},
                )
            )
        return found

    def _sensors(self, device: str) -> Sensors:
        sampler = self._samplers.get(device)
        newest = sampler.newest if sampler is not None else None
        return {"device": device} if newest is None else {"device": device, **card_state(newest)}


def _tensor(tensor: TensorSpec) -> TensorFigures:
    shape = tuple(-1 if isinstance(size, str) else size for size in tensor.shape)
    return TensorFigures(tensor.name, DATATYPES[tensor.dtype].name, shape)

"""Models follow a folder: a bundle put there is loaded, one replaced is loaded anew, one removed is unloaded."""

from __future__ import annotations

import asyncio

from onecard.errors import OnecardError
from onecard.server.http_types import LOGGER
from onecard.server.serving import Serving
from onecard.server.watch import Change, FolderWatch

LOOK_S = 1.0
"""How often the folder is looked at."""


async def load_all(watch: FolderWatch, serving: Serving) -> None:
    """Load what is in the folder now; one that cannot be loaded is logged, and shown in the repository's index."""
    await _apply(await asyncio.to_thread(watch.changes, True), serving)


async def follow(watch: FolderWatch, serving: Serving, look_s: float = LOOK_S) -> None:
    """Do as the folder says until cancelled."""
    while True:
        await asyncio.sleep(look_s)
        await _apply(await asyncio.to_thread(watch.changes), serving)


async def _apply(changes: list[Change], serving: Serving) -> None:
    for change in changes:
        if change.name in serving.repository.sources:
            continue  # its path was given by name, and stands
        try:
            if change.kind == "broken":
                LOGGER.warning("the bundle of model '%s' is not loaded: %s", change.name, change.reason)
            elif change.kind == "removed":
                await serving.unload(change.name)
                LOGGER.info("model '%s' is unloaded: its bundle is gone", change.name)
            else:
                await serving.load(change.name)
                LOGGER.info("model '%s' is loaded: its bundle was %s", change.name, change.kind)
        except OnecardError as error:
            LOGGER.error("model '%s': %s", change.name, error)

"""Which model of the engine's process is watched by a sentinel, and where the original runs."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path

from onecard.ipc.messages import Load
from onecard.recipe import ORIGINAL
from onecard.runtime.engine import Engine
from onecard.runtime.ingest import in_model_form
from onecard.runtime.sentinel import Sentinel, Watched
from onecard.server.engine_refusals import in_a_line
from onecard.telemetry.histogram import DIFFERENCES, Histogram

_LOGGER = logging.getLogger(__name__)


def open_sentinel(asked: Load, engine: Engine, is_idle: Callable[[], bool]) -> Sentinel | None:
    """The sentinel of a model that was opened, if it is to have one and there is something to compare.

    Args:
        asked: what was opened, and how.
        engine: of it.
        is_idle: whether no model of the process has anything to do.

    Returns:
        None without one; the log says why, where one was asked for.
    """
    options, name = asked.options, asked.name
    if not options.sentinel:
        return None
    variants = tuple(dict.fromkeys(variant for _, variant in engine.variants))
    if set(variants) == {ORIGINAL.id}:
        _LOGGER.info("model '%s' is served by its original: its sentinel has nothing to compare", name)
        return None
    device = engine.device if options.sentinel_device == "same" else "cpu"
    try:
        model_form = functools.partial(in_model_form, engine.spec, engine.options.ingest)
        watched = Watched(name, is_idle, variants, model_form)
        return Sentinel.open(Path(asked.path), options.sentinel, device, watched, Histogram(DIFFERENCES))
    except Exception as error:  # the model serves, whatever becomes of its sentinel
        _LOGGER.warning("model '%s' is served without a sentinel: %s", name, in_a_line(error))
        return None

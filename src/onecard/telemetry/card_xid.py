"""Xid errors: what the NVIDIA driver reports as critical, from double-bit memory errors to a card off the bus."""

from __future__ import annotations

from typing import Any

from onecard.nvml import Handle

_MOST_AT_ONCE = 100  # a card in a storm of errors does not hold the reader up


class XidWatch:
    """Counts the Xid errors of a card from the first :meth:`poll` on.

    Args:
        lib: the started pynvml module.
        card: the handle of the whole card.
    """

    def __init__(self, lib: Any, card: Handle) -> None:
        self._lib = lib
        self._card = card
        self._events: Any | None = None
        self._count = 0
        self._last: int | None = None

    @property
    def fields(self) -> dict[str, int]:
        """What was counted, as fields of a sample; empty before the driver agreed to report."""
        if self._events is None:
            return {}
        return {"xid_errors": self._count} | ({} if self._last is None else {"last_xid": self._last})

    def poll(self) -> dict[str, int]:
        """Take what the driver has reported since the last call, without waiting.

        Raises:
            NVMLError: the driver reports no such events here, or the card is lost; what came before is counted.
        """
        if self._events is None:
            self._events = self._register()
        for _ in range(_MOST_AT_ONCE):
            event = self._next(self._events)
            if event is None:
                break
            self._count += 1
            self._last = int(event.eventData)
        return self.fields

    def close(self) -> None:
        """Let the driver forget the watch."""
        events, self._events = self._events, None
        if events is not None:
            self._free(events)

    def _register(self) -> Any:
        events = self._lib.nvmlEventSetCreate()
        try:
            self._lib.nvmlDeviceRegisterEvents(self._card, self._lib.nvmlEventTypeXidCriticalError, events)
        except Exception:
            self._free(events)
            raise
        return events

    def _next(self, events: Any) -> Any | None:
        try:
            return self._lib.nvmlEventSetWait(events, 0)
        except self._lib.NVMLError as error:
            if error.value == self._lib.NVML_ERROR_TIMEOUT:
                return None
            raise

    def _free(self, events: Any) -> None:
        try:
            self._lib.nvmlEventSetFree(events)
        except self._lib.NVMLError:  # the card is lost: there is nothing left to free
            return

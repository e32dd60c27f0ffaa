"""The one error tree: every error a user can meet, with its exit code, HTTP status and cure.

OnecardError
├── UsageError             2  400  an option, recipe, spec or name that does not fit
│   └── SpecError          2  400  an input spec that cannot be read, or a tensor that breaks it
├── ModelError             3  422  the model cannot be found, built or called
├── DataError              4  422  a data file that cannot be read or does not fit the model
├── MissingDependencyError 5  501  an extra that is not installed
├── BundleError            6  500  a bundle that is damaged, unsafe or made by a newer onecard
├── NoVariantError         7  503  no variant of the bundle can run here
├── SearchError            8  500  the search could not end with a model
├── StorageError           9  507  a folder that cannot be written, or a full disk
├── EngineError           10  500  an engine that failed to answer
│   ├── QueueFullError    10  429  more is waiting than the engine takes on
│   ├── DeadlineError     10  504  the answer could not come in time
│   ├── EngineClosedError 10  503  the engine is closed, or closes before it could answer
│   └── DeviceMemoryError 10  507  not even the smallest batch fits in the device's memory
└── InterruptedSearch    130  499  Ctrl-C before there was anything to keep
"""

from __future__ import annotations

from typing import ClassVar


class OnecardError(Exception):
    """Base of all errors that onecard raises on purpose.

    Args:
        message: what was wrong and what was expected, in one or two sentences.
        cure: what the user can do about it, as an instruction.
    """

    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, cure: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.cure = cure

    def __str__(self) -> str:
        return f"{self.message} {self.cure}".strip()


class UsageError(OnecardError):
    """An option, recipe or name that does not fit; the message lists what would."""

    exit_code = 2
    http_status = 400


class SpecError(UsageError):
    """A spec that cannot be read, or a tensor that does not satisfy it."""


class ModelError(OnecardError):
    """The model cannot be found, built or called."""

    exit_code = 3
    http_status = 422


class DataError(OnecardError):
    """Data that cannot be read or does not fit the model's spec."""

    exit_code = 4
    http_status = 422


class MissingDependencyError(OnecardError):
    """An optional package is not installed; the cure is the pip command."""

    exit_code = 5
    http_status = 501


class BundleError(OnecardError):
    """A bundle that is damaged, tampered with, too large, or newer than this onecard."""

    exit_code = 6


class NoVariantError(OnecardError):
    """No variant of the bundle can run, or answers rightly, on this machine."""

    exit_code = 7
    http_status = 503


class SearchError(OnecardError):
    """The search could not end with a model: even the original could not be run."""

    exit_code = 8


class StorageError(OnecardError):
    """A folder that cannot be written, or a disk that is full."""

    exit_code = 9
    http_status = 507


class EngineError(OnecardError):
    """The engine failed to answer a request."""

    exit_code = 10


class QueueFullError(EngineError):
    """More is waiting than the engine takes on.

    Args:
        message: which bound is reached, and by how much.
        cure: what the caller can do.
        retry_after_s: when it is worth trying again.
    """

    http_status = 429

    def __init__(self, message: str, cure: str = "", retry_after_s: float = 0.0) -> None:
        super().__init__(message, cure)
        self.retry_after_s = retry_after_s


class DeadlineError(EngineError):
    """The answer did not, or could not, come before the request's deadline."""

    http_status = 504


class EngineClosedError(EngineError):
    """The engine is closed, or was closed before it could answer."""

    http_status = 503


class DeviceMemoryError(EngineError):
    """Not even the smallest batch fits in the device's memory."""

    http_status = 507


class InterruptedSearch(OnecardError):
    """The user stopped the search before any variant was ready."""

    exit_code = 130
    http_status = 499


class Unsupported(Exception):
    """A backend's or transform's honest no to this model: becomes a row ``unsupported``.

    Args:
        detail: what could not be done, short.
        cure: what would make it possible, if anything.
    """

    def __init__(self, detail: str, cure: str = "") -> None:
        super().__init__(detail)
        self.detail = detail
        self.cure = cure

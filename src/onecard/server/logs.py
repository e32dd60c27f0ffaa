"""Logs of the server: one record a line, for people or as JSON; ids of requests; and a sampled log of them.

Whatever clients sent is escaped, so that nobody can write lines of their own into the log or steer a terminal.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
import secrets
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, TextIO, TypeAlias

from onecard.errors import UsageError

Form: TypeAlias = Literal["human", "json"]

FORMS = ("human", "json")
LEVELS = ("debug", "info", "warning", "error")
TREE = "onecard"
_HANDLER = "onecard.server.logs"

_FIRST_SERVER_ERROR = 500
_MAX_PATH = 512  # characters of a path that are logged
_LEAST_SAMPLE = 1_000_000  # one in so many is the rarest
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._\-]{1,128}")
_PLAIN = re.compile(r"[^\s\"=]+")
# C0, DEL and C1 controls, line and paragraph separators, marks that turn the direction of writing, lone surrogates.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_STANDARD = frozenset({*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"})

Scalar: TypeAlias = "str | int | float | bool | None"


def setup_logs(form: Form, level: str, stream: TextIO | None = None, process: str = "") -> logging.Handler:
    """Write the records of onecard's loggers, and others' warnings, one a line. A second call replaces the first one's.

    Args:
        form: ``human`` or ``json``; with that, what Python's ``warnings`` say are records too.
        level: the least severe of onecard's that is written: ``debug``, ``info``, ``warning`` or ``error``.
        stream: where to; None for standard error.
        process: which one of the server's writes; empty for one that has no name.

    Returns:
        The handler that writes.

    Raises:
        UsageError: no such form or level.
    """
    if form not in FORMS:
        raise UsageError(f"unknown form of logs '{form}': expected {' or '.join(FORMS)}.")
    if level not in LEVELS:
        raise UsageError(f"unknown log level '{level}': expected one of {', '.join(LEVELS)}.")
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.set_name(_HANDLER)
    handler.setFormatter(JsonFormatter(process) if form == "json" else HumanFormatter(process))
    tree = logging.getLogger(TREE)
    _put(handler, tree)
    tree.setLevel(level.upper())
    tree.propagate = False  # else a handler of the root writes it a second time
    # Python writes others' warnings in any case, if nobody else does: bare, and of several lines.
    _put(handler, logging.getLogger())
    logging.captureWarnings(form == "json")
    return handler


def _put(handler: logging.Handler, logger: logging.Logger) -> None:
    for other in [each for each in logger.handlers if each.name == _HANDLER]:  # handlers of others stay
        logger.removeHandler(other)
    logger.addHandler(handler)


class JsonFormatter(logging.Formatter):
    """One JSON object a line, ASCII only: time, level, logger, message, and what was passed as ``extra``.

    Args:
        process: said with each record, if it is not empty.
    """

    def __init__(self, process: str = "") -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Scalar] = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if self._process:
            fields["process"] = self._process
        for name, value in _extra(record).items():
            fields.setdefault(name, value)
        trace = _trace(self, record)
        if trace:
            fields["exception"] = trace
        return json.dumps(fields)


class HumanFormatter(logging.Formatter):
    """``TIME LEVEL LOGGER message name=value ...``; lines of a traceback follow, indented.

    Args:
        process: said with each record, if it is not empty.
    """

    def __init__(self, process: str = "") -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        parts = [_utc(record.created), f"{record.levelname:<7}", record.name, _escape(record.getMessage())]
        if self._process:
            parts.append(f"process={self._process}")
        parts += [f"{_escape(name)}={_shown(value)}" for name, value in _extra(record).items() if value is not None]
        lines = [" ".join(parts)]
        lines += [f"    {_escape(line)}" for line in _trace(self, record).split("\n") if line]
        return "\n".join(lines)


def _utc(seconds: float) -> str:
    """ISO 8601 with milliseconds, cut and not rounded, so that they never are 1000."""
    whole = math.floor(seconds)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{int((seconds - whole) * 1000):03d}Z"


def _extra(record: logging.LogRecord) -> dict[str, Scalar]:
    return {name: _scalar(value) for name, value in vars(record).items() if name not in _STANDARD}


def _scalar(value: object) -> Scalar:
    """What JSON can say; any other is said in words."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, bytes | bytearray):
        return value.decode("ascii", "backslashreplace")
    return str(value)


def _shown(value: Scalar) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if _PLAIN.fullmatch(text) and not _UNSAFE.search(text) else json.dumps(text)


def _escape(text: str) -> str:
    return _UNSAFE.sub(lambda found: _named(ord(found[0])), text)


def _named(code: int) -> str:
    return f"\\x{code:02x}" if code <= 0xFF else f"\\u{code:04x}"  # noqa: PLR2004 - what two digits hold


def _trace(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    parts = []
    if record.exc_info:
        parts.append(formatter.formatException(record.exc_info))
    if record.stack_info:
        parts.append(formatter.formatStack(record.stack_info))
    return "\n".join(parts)


class RequestIds:
    """Names requests: as the client does in ``X-Request-Id``, if that can stand in a log, else by counting.

    Ids that were counted begin with what is random for each process, so that those of two servers differ.
    """

    def __init__(self) -> None:
        self._prefix = secrets.token_hex(6)
        self._count = itertools.count(1)

    def __call__(self, headers: Mapping[bytes, bytes]) -> str:
        """The id of a request.

        Args:
            headers: its header fields, names in lower case.
        """
        given = headers.get(b"x-request-id")
        if given is not None and _REQUEST_ID.fullmatch(given):
            return given.decode("ascii")
        return f"{self._prefix}-{next(self._count)}"


@dataclass(frozen=True, slots=True)
class Entry:
    """One request of the access log. It holds neither header fields, nor the query, nor a body: tokens travel there.

    Args:
        method: of HTTP, or the name of the call.
        path: what was asked for; anything from ``?`` on is not written.
        status: of HTTP.
        bytes_in: of the request's body.
        bytes_out: of the answer's body.
        ms: from the request's head to its answer.
        client: where it came from.
        model: its name, if it was for one.
        request_id: its id.
        trace_id: of its trace, if it is traced.
    """

    method: str
    path: str
    status: int
    bytes_in: int
    bytes_out: int
    ms: float
    client: str
    model: str = ""
    request_id: str = ""
    trace_id: str = ""


class AccessLog:
    """Logs some of all requests, evenly spread, and every one that failed through the server's fault.

    Ask ``is_due`` for each request once, and ``write`` those that are: what is not written costs next to nothing.

    Args:
        sample: which part of the requests is logged: 1 is all, 0.01 one in a hundred, 0 none but failures.

    Raises:
        UsageError: not between 0 and 1.
    """

    def __init__(self, sample: float) -> None:
        if not 0 <= sample <= 1:
            raise UsageError(f"the access log cannot sample {sample}: expected a part of all requests, 0 to 1.")
        ratio = Fraction(sample).limit_denominator(_LEAST_SAMPLE)
        self._step, self._whole = ratio.numerator, ratio.denominator
        self._sum = self._whole - self._step  # the first one is logged
        self._logger = logging.getLogger(f"{TREE}.access")

    def is_due(self, status: int) -> bool:
        """Whether this request is to be written. Counts it.

        Args:
            status: of the answer.
        """
        if self._step:
            self._sum += self._step
            if self._sum >= self._whole:
                self._sum -= self._whole
                return True
        return status >= _FIRST_SERVER_ERROR

    def write(self, entry: Entry) -> None:
        """Log a request: a warning if the server failed, else for information."""
        path = entry.path.partition("?")[0]
        fields: dict[str, Any] = {
            "method": entry.method,
            "path": path if len(path) <= _MAX_PATH else f"{path[:_MAX_PATH]}...",
            "status": entry.status,
            "bytes_in": entry.bytes_in,
            "bytes_out": entry.bytes_out,
            "ms": round(entry.ms, 3),
            "client": entry.client,
            "model": entry.model or None,
            "request_id": entry.request_id or None,
            **({"trace_id": entry.trace_id} if entry.trace_id else {}),
        }
        level = logging.WARNING if entry.status >= _FIRST_SERVER_ERROR else logging.INFO
        self._logger.log(level, "request", extra=fields)

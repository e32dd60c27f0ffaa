"""What LoadGen says of a run: its summary read into a value, and what to change where it says INVALID.

Whether a run is valid is LoadGen's word alone; nothing here decides it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from onecard.bench.mlperf_job import LOG_PREFIX, STREAMS, MlperfSettings
from onecard.errors import EngineError

SUMMARY = f"{LOG_PREFIX}summary.txt"

_RULE = "====="
_LINE = re.compile(r"^(?P<key>[^:]+?)\s*:\s*(?P<value>.*)$")
_SATISFIED = re.compile(r"^(?P<what>.+?) satisfied\s*:\s*(?P<answer>Yes|NO)$")
_TARGET = re.compile(r"^(?P<percentile>[\d.]+)th percentile latency \(ns\)$")
_LATENCY = re.compile(r"^(?P<name>Min|Max|Mean|[\d.]+ percentile) latency \(ns\)$")
_RATES = ("Samples per second", "Completed samples per second")
_COUNT = re.compile(r"^(?P<count>No|\d+) (?P<what>warnings?|errors?) encountered", re.IGNORECASE)
_QUERIES = re.compile(r"at least (?P<count>\d+)\s+(?P<more>more )?(?:total )?queries")


@dataclass(frozen=True)
class MlperfSummary:
    """LoadGen's summary.

    Args:
        valid: LoadGen's verdict; None in the accuracy mode, which has none.
        unmet: the conditions that it found not satisfied, in its words.
        remarks: its recommendations and what it says of early stopping, line by line.
        samples_per_s: in Offline and Server, else None.
        latency_percentile: which latency is the result in SingleStream and MultiStream (0.9), else None.
        latency_ns: ``result`` for that latency; ``min``, ``max``, ``mean``, ``p50``, ``p99.9`` ... In MultiStream of
            queries, in Offline of the samples from the start.
        parameters: what LoadGen says it used, by its own names.
        warnings: how many it logged.
        errors: likewise.
    """

    valid: bool | None
    unmet: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    samples_per_s: float | None = None
    latency_percentile: float | None = None
    latency_ns: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    warnings: int = 0
    errors: int = 0


def read_summary(folder: Path, settings: MlperfSettings) -> MlperfSummary:
    """Read the summary that LoadGen wrote.

    Raises:
        EngineError: it is not there, or there is no verdict in it although the run was for performance.
    """
    path = folder / SUMMARY
    try:
        text = path.read_text("utf-8", "replace")
    except OSError as error:
        raise EngineError(f"LoadGen's summary {path} cannot be read: {error.strerror}.", "Run it again.") from error
    summary = parse_summary(text)
    if settings.mode == "performance" and summary.valid is None:
        raise EngineError(f"LoadGen's summary {path} says neither VALID nor INVALID.", "Its detailed log may say why.")
    return summary


def parse_summary(text: str) -> MlperfSummary:
    """Read the text of a summary; what is not in it is not in the answer either."""
    results, parameters = _sections(text)
    values = {found["key"]: found["value"] for line in results if (found := _LINE.match(line))}
    target = next(((_TARGET.match(key), value) for key, value in values.items() if _TARGET.match(key)), None)
    latency = {_short(found["name"]): int(value) for key, value in values.items() if (found := _LATENCY.match(key))}
    percentile = None
    if target is not None and target[0] is not None:
        percentile, latency = float(target[0]["percentile"]) / 100, {"result": int(target[1]), **latency}
    verdict = values.get("Result is")
    satisfied = [found for line in results if (found := _SATISFIED.match(line))]
    counts = {c["what"].lower().rstrip("s"): c["count"] for line in text.splitlines() if (c := _COUNT.match(line))}
    return MlperfSummary(
        valid={"VALID": True, "INVALID": False}.get(verdict or ""),
        unmet=tuple(found["what"] for found in satisfied if found["answer"] == "NO"),
        remarks=_remarks(results),
        samples_per_s=next((float(values[name]) for name in _RATES if name in values), None),
        latency_percentile=percentile,
        latency_ns=latency,
        parameters={found["key"]: found["value"] for line in parameters if (found := _LINE.match(line))},
        warnings=_number(counts.get("warning", "No")),
        errors=_number(counts.get("error", "No")),
    )


def advise(summary: MlperfSummary, settings: MlperfSettings) -> list[str]:
    """What to change so that LoadGen may find the run valid, an instruction for each condition that was not met."""
    advice = []
    if "Performance constraints" in summary.unmet:
        advice.append(_lower_rate(settings))
    if "Min duration" in summary.unmet:
        advice.append(_run_longer(summary, settings))
    if "Min queries" in summary.unmet:
        advice.append(
            f"fewer than {settings.min_queries} queries were sent: lower --min-queries, or see the detailed log."
        )
    if "Early stopping" in summary.unmet and "Performance constraints" not in summary.unmet:
        advice.append(_more_queries(summary))
    known = ("Performance constraints", "Min duration", "Min queries", "Early stopping")
    advice += [f"{what}: not satisfied; see the summary." for what in summary.unmet if what not in known]
    return advice


def _lower_rate(settings: MlperfSettings) -> str:
    assert settings.latency_s is not None  # the scenario's settings were checked
    percentile = f"p{100 * (settings.percentile or 0.99):g}"
    return (
        f"latency bound missed, the {percentile} is above {1e3 * settings.latency_s:g} ms: "
        f"lower --qps (now {settings.qps:g}), or allow more with --latency."
    )


def _run_longer(summary: MlperfSummary, settings: MlperfSettings) -> str:
    said = f"min duration of {settings.min_duration_s:g} s not met, the queries were answered sooner than expected: "
    if settings.scenario in STREAMS:
        expected_ms = 1e3 / float(summary.parameters.get("target_qps", "nan"))
        return said + f"expect less than {expected_ms:.3g} ms with --latency."
    if settings.scenario == "Offline":
        expected = float(summary.parameters.get("target_qps", "nan"))
        return said + f"expect more than {max(expected, summary.samples_per_s or 0.0):.4g} samples/s with --qps."
    return said + f"raise --qps (now {settings.qps:g})."


def _more_queries(summary: MlperfSummary) -> str:
    said = "too few queries to be sure of the percentile"
    found = _QUERIES.search(" ".join(summary.remarks))
    if found is None:
        return f"{said}: raise --min-duration or --min-queries."
    wanted = f"at least {found['count']} {found['more'] or ''}".strip()
    return f"{said}, LoadGen wants {wanted}: raise --min-duration or --min-queries."


def _sections(text: str) -> tuple[list[str], list[str]]:
    """Stripped lines of the results and of the parameters; a section's heading stands between two rules."""
    results: list[str] = []
    parameters: list[str] = []
    current = results
    for line in text.splitlines():
        if line.startswith("Test Parameters"):
            current = parameters
        elif line.strip() and not line.startswith(_RULE):
            current.append(line.strip())
    return results, parameters


def _remarks(lines: list[str]) -> tuple[str, ...]:
    """The lines behind ``* ``, each with those that go on from it."""
    remarks: list[str] = []
    inside = False
    for line in lines:
        if line.startswith("* "):
            remarks.append(line.removeprefix("* "))
            inside = True
        elif inside and not _LINE.match(line) and line != "Additional Stats":
            remarks[-1] += f" {line}"
        else:
            inside = False
    return tuple(remarks)


def _short(name: str) -> str:
    if name in ("Min", "Max", "Mean"):
        return name.lower()
    return f"p{float(name.removesuffix(' percentile')):g}"


def _number(text: str) -> int:
    return 0 if text == "No" else int(text)

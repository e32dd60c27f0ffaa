"""The findings for people: one line each, its reason and its cure below it, the trouble counted at the end."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from onecard.doctor.finding import Finding

_COLOURS = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "bold red"}
_LEVEL_WIDTH = max(map(len, _COLOURS))


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    """All findings in their order, then how many are not well."""
    width = max((len(finding.area) for finding in findings), default=0)
    indent = " " * (_LEVEL_WIDTH + width + 4)
    for finding in findings:
        mark = f"[{_COLOURS[finding.level]}]{finding.level:>{_LEVEL_WIDTH}}[/]"
        console.print(f"{mark}  {escape(f'{finding.area:<{width}}')}  {escape(finding.what)}", soft_wrap=True)
        if finding.why:
            console.print(f"{indent}{escape(finding.why)}", soft_wrap=True)
        if finding.cure:
            console.print(f"{indent}→ {escape(finding.cure)}", soft_wrap=True)
    console.print(summary(findings), soft_wrap=True)


def summary(findings: Sequence[Finding]) -> str:
    """The last line: how many errors, warnings and notes there are."""
    counts = {level: sum(finding.level == level for finding in findings) for level in ("error", "warning", "note")}
    told = [f"{count} {level}{'s' if count > 1 else ''}" for level, count in counts.items() if count]
    return f"{', '.join(told)}." if told else "All is well."

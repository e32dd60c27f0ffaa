"""The page's facts: how to load the bundle, the machine, the card's own readings, the search's settings."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from html import escape

from onecard.evidence import CardState, Evidence
from onecard.recipe import ORIGINAL
from onecard.report import figures
from onecard.report import format as fmt

_PLAIN_NAME = re.compile(r"[\w.\-]+")


def how_to_load(evidence: Evidence, bundle: str) -> str:
    """Three lines of Python and one command; odd folder names are replaced rather than quoted."""
    folder = bundle if _PLAIN_NAME.fullmatch(bundle) else "model.onecard"
    inputs = ", ".join(f"{_variable(t.name)}={_variable(t.name)}" for t in evidence.spec.inputs)
    python = f'import onecard\nmodel = onecard.load("{folder}")\noutputs = model({inputs})'
    shell = f"onecard run {folder} inputs.npz -o outputs.npz"
    return (
        f"<div class='columns'><div><h3>In Python</h3><pre>{escape(python)}</pre></div>"
        f"<div><h3>In a shell</h3><pre>{escape(shell)}</pre></div></div>"
    )


def _variable(name: str) -> str:
    """An input's name as a Python variable."""
    return re.sub(r"\W", "_", fmt.clean(name)) or "x"


def _facts(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """A table of name and value; empty values are left out."""
    shown = "".join(
        f"<tr><th scope='row'>{escape(fmt.clean(name))}</th><td>{escape(fmt.clean(value))}</td></tr>"
        for name, value in rows
        if value
    )
    return f"<div><h3>{title}</h3><table class='facts'><tbody>{shown}</tbody></table></div>" if shown else ""


def environment_table(evidence: Evidence) -> str:
    """The card or processor and the versions that decide the figures."""
    env = evidence.environment
    machine = [("device", env.device)]
    if env.card:
        card = env.card
        machine += [
            ("card", f"{card.name}, {fmt.bytes_(card.memory_bytes)}"),
            ("compute capability", card.compute_capability),
            ("driver", card.driver),
        ]
    machine += [
        ("processor", env.cpu),
        ("instruction sets", ", ".join(env.cpu_flags)),
        ("cores, threads", f"{env.cores} cores, {env.threads} threads"),
        ("main memory", fmt.bytes_(env.memory_bytes)),
    ]
    return f"<div class='columns'>{_facts('Machine', machine)}{_facts('Versions', list(env.versions.items()))}</div>"


_READINGS: tuple[tuple[str, Callable[[CardState], float | None], str], ...] = (
    ("temp. °C", lambda s: s.temperature_c, ".0f"),
    ("power W", lambda s: s.power_w, ".0f"),
    ("SM clock MHz", lambda s: s.sm_clock_mhz, ".0f"),
    ("memory clock MHz", lambda s: s.memory_clock_mhz, ".0f"),
    ("busy", lambda s: s.utilisation, ".0%"),
)


def card_table(evidence: Evidence) -> str:
    """The card's readings before and after the timings that decided, each bucket's winner and original."""
    rows = []
    for bucket in figures.buckets(evidence):
        for name in dict.fromkeys((figures.winner(evidence, bucket), ORIGINAL.id)):
            timing = evidence.timing(name, bucket)
            if timing and _reported(timing.before, timing.after):
                cells = "".join(_reading(get, timing.before, timing.after, form) for _, get, form in _READINGS)
                throttle = sorted({*timing.before.throttle, *timing.after.throttle})
                rows.append(
                    f"<tr><th scope='row'><code>{escape(fmt.clean(name))}</code></th>"
                    f"<td>{escape(fmt.sizes(bucket))}</td>{cells}"
                    f"<td>{escape(fmt.clean(', '.join(throttle))) or 'none'}</td></tr>"
                )
    if not rows:
        return ""
    heads = "".join(f"<th scope='col' class='n'>{name}</th>" for name, _, _ in _READINGS)
    return (
        "<h3>The card, before → after each timing</h3><div class='fit'><table class='facts card'>"
        f"<thead><tr><th scope='col'>recipe</th><th scope='col'>at</th>{heads}<th scope='col'>throttled by</th>"
        "</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _reported(before: CardState, after: CardState) -> bool:
    return before != CardState() or after != CardState()


def _reading(get: Callable[[CardState], float | None], before: CardState, after: CardState, form: str) -> str:
    shown = [fmt.NONE if (value := get(state)) is None else format(value, form) for state in (before, after)]
    text = shown[0] if shown[0] == shown[1] else " → ".join(shown)
    return f"<td class='n'>{escape(text)}</td>"


def search_table(evidence: Evidence) -> str:
    """What was asked for, and what the search had to say."""
    own = fmt.relative_error(evidence.reference_error) if evidence.reference_error is not None else ""
    rows = [
        ("model", evidence.model),
        ("inputs", str(evidence.spec)),
        ("outputs", "; ".join(map(str, evidence.spec.outputs))),
        ("sizes timed", "; ".join(map(fmt.sizes, figures.buckets(evidence)))),
        ("objective", evidence.objective),
        ("original's own error", own),
        ("best trade-offs", ", ".join(evidence.pareto)),
        ("command", evidence.command),
        *((f"note {number}", note) for number, note in enumerate(evidence.notes, 1)),
    ]
    return _facts("Search", rows)

"""What our dashboards and alerts ask Prometheus, and whether it has an answer."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

import yaml

from onecard.telemetry.catalogue import all_metrics
from onecard.telemetry.monitoring import monitoring_files
from tests.services.prometheus_process import Prometheus

_NAME = re.compile(r"\bonecard[_:][a-z0-9_:]+")
_SELECTOR = re.compile(r"\b(?:onecard[_:][a-z0-9_:]+|up)\b(?:\{[^}]*\})?")
_LABEL_VALUES = re.compile(r"label_values\((.*), *(\w+)\)")


class Query(NamedTuple):
    """An expression, and where it stands."""

    place: str
    expression: str


def dashboards() -> dict[str, dict[str, Any]]:
    files = {name: content for name, content in monitoring_files().items() if "dashboards/" in name}
    return {name.rpartition("/")[2]: json.loads(content) for name, content in files.items() if name.endswith(".json")}


def rules(file: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load(monitoring_files()[f"rules/{file}.yml"])["groups"]
    return [rule for group in groups for rule in group["rules"]]


def filled(expression: str, variables: dict[str, str]) -> str:
    """An expression with Grafana's variables replaced as Grafana would."""
    values = {"__rate_interval": "1m", **variables}
    return re.sub(r"\$\{?(\w+)\}?", lambda match: values.get(match[1], ".*"), expression)


def panel_queries(variables: dict[str, str]) -> list[Query]:
    return [
        Query(f"{name}: {panel['title']}", filled(target["expr"], variables))
        for name, board in dashboards().items()
        for panel in board["panels"]
        for target in panel.get("targets", ())
    ]


def alert_selectors() -> list[Query]:
    return [Query(rule["alert"], selector) for rule in rules("alerts") for selector in _SELECTOR.findall(rule["expr"])]


def variable_values(prometheus: Prometheus) -> dict[str, list[str]]:
    """What each list on top of a dashboard would offer."""
    offered = {}
    for name, board in dashboards().items():
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                match = _LABEL_VALUES.fullmatch(filled(variable["definition"], {}))
                assert match, variable["definition"]
                offered[f"{name}: {variable['name']}"] = prometheus.label_values(match[2], match[1])
    return offered


def base_metrics(expression: str) -> set[str]:
    """The metrics of the catalogue that an expression rests on, also by way of recording rules."""
    recorded = {rule["record"]: rule["expr"] for rule in rules("recording")}
    found = set()
    for name in _NAME.findall(expression):
        if name in recorded:
            found |= base_metrics(recorded[name])
        else:
            found.add(re.sub(r"_(bucket|sum|count)$", "", name))
    return found


def unanswered(prometheus: Prometheus, queries: list[Query], page: str) -> list[str]:
    """The queries that give no data.

    Args:
        prometheus: to ask.
        queries: all of them.
        page: of ``/metrics``. What rests on a metric that is not on it, such as a sensor that the machine does not
            have, is passed over.
    """
    absent = set(all_metrics()) - set(re.findall(r"^# TYPE (\w+)", page, re.MULTILINE))
    asked = [query for query in queries if not base_metrics(query.expression) & absent]
    return [f"{place}: {expression}" for place, expression in asked if not prometheus.query(expression)]

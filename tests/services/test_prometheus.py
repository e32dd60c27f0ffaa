"""A real Prometheus scrapes our metrics; every panel and every alert of our files is tried on what it has."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from onecard.telemetry.catalogue import all_metrics
from onecard.telemetry.exposition import expose
from onecard.telemetry.monitoring import write_monitoring
from tests.services.monitoring_queries import (
    alert_selectors,
    base_metrics,
    panel_queries,
    rules,
    unanswered,
    variable_values,
)
from tests.services.prometheus_process import NOT_HERE, PROMETHEUS, PROMTOOL, Prometheus, free_port, watching
from tests.services.synthetic_snapshots import serving_metrics, snapshot, ticking

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(PROMETHEUS is None or PROMTOOL is None, reason=NOT_HERE),
]
HEALTHY = ("gpu", "cpu")
VARIABLES = {"model_a": "resnet50", "model_b": "resnet50-int8"}


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It watches two servers that are well, one that has every trouble there is, and one that is not there."""
    folder = tmp_path_factory.mktemp("prometheus")
    with (
        serving_metrics(ticking()) as gpu,
        serving_metrics(ticking(on_cpu=True)) as cpu,
        serving_metrics(ticking(trouble=True), "triton") as troubled,
        watching(folder, {"gpu": gpu, "cpu": cpu, "troubled": troubled, "dead": free_port()}) as found,
    ):
        found.wait_for(
            lambda: found.query('count_over_time(onecard_build_info{instance="troubled"}[5m]) >= 4'), "four scrapes"
        )
        yield found


def promtool(*words: str, folder: Path) -> None:
    done = subprocess.run([str(PROMTOOL), *words], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_settings_and_the_rules(tmp_path):
    write_monitoring(tmp_path)
    promtool("check", "config", "prometheus.yml", folder=tmp_path)
    promtool("check", "rules", "--lint-fatal", "rules/recording.yml", "rules/alerts.yml", folder=tmp_path)


@pytest.mark.parametrize("compatibility", ["", "triton"])
def test_promtool_finds_nothing_wrong_with_our_own_names(compatibility):
    page = expose(snapshot(10), "", compatibility).body
    done = subprocess.run([str(PROMTOOL), "check", "metrics"], input=page, capture_output=True, check=False)
    assert done.returncode in (0, 3), done.stderr  # 3: it reads the page, but advises against a name
    assert not [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith(b"nv_")]


def test_every_server_that_is_there_is_scraped(prometheus):
    def found() -> dict[str, str]:
        return {series["metric"]["instance"]: series["value"][1] for series in prometheus.query("up")}

    # A machine that stands still for a second loses a scrape.
    prometheus.wait_for(lambda: found() == {**dict.fromkeys((*HEALTHY, "troubled"), "1"), "dead": "0"}, "all are up")


def test_every_panel_gets_data(prometheus):
    queries = panel_queries(VARIABLES)
    page = "\n".join(f"# TYPE {name} " for name in all_metrics())  # the servers have all that there is
    prometheus.wait_for(lambda: not unanswered(prometheus, queries, page), "data in every panel")


def test_a_panel_that_asks_for_nothing_is_found(prometheus):
    page = "# TYPE onecard_build_info gauge\n"
    queries = panel_queries(VARIABLES)
    others = [q for q in queries if "build_info" not in q.expression]
    prometheus.wait_for(lambda: not unanswered(prometheus, others, page), "all others are answered")
    mistaken = [q._replace(expression=q.expression.replace("{", '{no="where",')) for q in queries]
    assert unanswered(prometheus, mistaken, page)


def test_every_list_of_a_dashboard_offers_something(prometheus):
    for place, values in variable_values(prometheus).items():
        assert values, place
        if "model" in place:
            assert {"resnet50", "resnet50-int8"} <= set(values), place


def test_every_alert_asks_for_something_that_is_there(prometheus):
    for asked in alert_selectors():
        prometheus.wait_for(lambda query=asked.expression: prometheus.query(query), str(asked))


def test_every_recording_rule_records(prometheus):
    for rule in rules("recording"):

        def recorded(name: str = rule["record"]) -> set[str]:
            return {series["metric"]["instance"] for series in prometheus.query(name)}

        prometheus.wait_for(lambda: set(HEALTHY) <= recorded(), rule["record"])


def test_recorded_figures_are_right(prometheus):
    def recorded(name: str) -> dict[str, float]:
        def found() -> dict[str, float]:
            series = prometheus.query(f'{name}{{model=~"resnet50|"}}')
            return {each["metric"]["instance"]: float(each["value"][1]) for each in series}

        return prometheus.wait_for(lambda: now if {"gpu", "troubled"} <= (now := found()).keys() else {}, name)

    errors = recorded("onecard:request_errors:ratio_rate5m")
    refusals = recorded("onecard:request_refusals:ratio_rate5m")
    assert errors["gpu"] == 0
    assert refusals["gpu"] == 0
    offered = 100 + 70 + 1  # a tick: answered, seven reasons ten times each, and one bad input
    assert errors["troubled"] == pytest.approx(30 / offered, rel=1e-3)
    assert refusals["troubled"] == pytest.approx(30 / offered, rel=1e-3)
    assert 0.01 <= recorded("onecard:request_duration_seconds:p99_5m")["gpu"] <= 0.015
    joules = 'onecard:joules_per_row:rate5m{instance="gpu", device="cuda:0"}'
    watts = prometheus.wait_for(lambda: prometheus.query(joules), joules)
    assert float(watts[0]["value"][1]) == pytest.approx(600 / (2 * 4 * 100), rel=1e-3)


def test_every_alert_fires_where_there_is_trouble_and_nowhere_else(prometheus):
    expected = {rule["alert"] for rule in rules("alerts")}

    def firing() -> set[str]:
        return {alert["labels"]["alertname"] for alert in prometheus.alerts() if alert["state"] == "firing"}

    prometheus.wait_for(lambda: expected <= firing(), f"{sorted(expected)} all fire")
    # One scrape that a busy machine was too slow for tells of itself until the next one.
    prometheus.wait_for(lambda: not {a["labels"]["instance"] for a in prometheus.alerts()} & {*HEALTHY}, "no others do")
    for alert in prometheus.alerts():
        for text in alert["annotations"].values():
            assert "<no value>" not in text
            assert "<error" not in text
    assert {alert["labels"]["alertname"] for alert in prometheus.alerts() if alert["labels"]["instance"] == "dead"} == {
        "OnecardScrapeFails"
    }


def test_a_server_that_vanished_from_the_targets_is_told_of(tmp_path):
    write_monitoring(tmp_path)
    alert = {
        "exp_labels": {"severity": "critical", "job": "onecard"},
        "exp_annotations": next(r for r in rules("alerts") if r["alert"] == "OnecardScrapeFails")["annotations"]
        | {"summary": "No onecard server is watched"},
    }
    case = {
        "interval": "15s",
        "input_series": [{"series": 'up{job="onecard", instance="a"}', "values": "1x20 stale"}],
        "alert_rule_test": [
            {"eval_time": "4m", "alertname": "OnecardScrapeFails", "exp_alerts": []},
            {"eval_time": "12m", "alertname": "OnecardScrapeFails", "exp_alerts": [alert]},
        ],
    }
    (tmp_path / "case.yml").write_text(yaml.safe_dump({"rule_files": ["rules/alerts.yml"], "tests": [case]}))
    promtool("test", "rules", "case.yml", folder=tmp_path)


def test_prometheus_asks_for_openmetrics_and_reads_it(prometheus):
    (entry,) = prometheus.metadata("onecard_request_duration_seconds")
    assert (entry["type"], entry["unit"]) == ("histogram", "seconds")  # the text format says no units
    wanted = {"nv_inference_request_success", "nv_gpu_utilization", "nv_cpu_utilization"}

    def names() -> set[str]:
        found = prometheus.query('{instance="troubled", __name__=~"nv_.+"}')
        return {series["metric"]["__name__"] for series in found}

    prometheus.wait_for(lambda: wanted <= names(), "Triton's names")


def test_every_metric_but_a_few_is_on_a_dashboard():
    shown = set().union(*(base_metrics(query.expression) for query in panel_queries(VARIABLES)))
    assert set(all_metrics()) - shown == {
        *("onecard_server_live", "onecard_server_start_time_seconds", "onecard_server_fronts"),
        *("onecard_requests_admitted_total", "onecard_process_start_time_seconds", "onecard_process_threads"),
    }

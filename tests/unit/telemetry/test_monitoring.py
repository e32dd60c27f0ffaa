"""The files for Prometheus and Grafana: complete, consistent, and written without destroying anybody's changes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from onecard import cli_dashboards
from onecard.errors import StorageError, UsageError
from onecard.telemetry.catalogue import all_metrics
from onecard.telemetry.monitoring import monitoring_files, write_monitoring
from tests.services.monitoring_queries import base_metrics, dashboards, filled, panel_queries, rules

BOARDS = sorted(dashboards())


def test_files_are_written_as_they_are(tmp_path):
    written = write_monitoring(tmp_path / "new")
    assert {path.relative_to(tmp_path / "new").as_posix() for path in written} == set(monitoring_files())
    assert write_monitoring(tmp_path / "new") == written  # again is no change


def test_servers_are_named(tmp_path):
    write_monitoring(tmp_path, ["10.0.0.1:8000", "[::1]:80", "gpu-1.lan:8000"])
    (group,) = yaml.safe_load((tmp_path / "targets.yml").read_text())
    assert group == {"targets": ["10.0.0.1:8000", "[::1]:80", "gpu-1.lan:8000"]}
    for wrong in ("localhost", "http://a:80", 'a:1"\n- b', ":80", "a:port"):
        with pytest.raises(UsageError, match="is not HOST:PORT"):
            write_monitoring(tmp_path / "wrong", [wrong])
    assert not (tmp_path / "wrong").exists()


def test_changed_files_are_kept_unless_forced(tmp_path):
    write_monitoring(tmp_path)
    rules_file = tmp_path / "rules" / "alerts.yml"
    rules_file.write_text("groups: []\n")
    (tmp_path / "compose.yml").unlink()
    with pytest.raises(UsageError, match=r"alerts\.yml is there and differs.*--force"):
        write_monitoring(tmp_path)
    assert rules_file.read_text() == "groups: []\n"
    assert not (tmp_path / "compose.yml").exists()
    write_monitoring(tmp_path, force=True)
    assert rules_file.read_bytes() == monitoring_files()["rules/alerts.yml"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        write_monitoring(tmp_path / "file" / "folder")


def test_the_command(tmp_path):
    app = typer.Typer()
    cli_dashboards.register(app)
    done = CliRunner().invoke(app, ["-o", str(tmp_path / "m"), "--server", "10.0.0.1:8000"])
    assert done.exit_code == 0, done.output
    assert "compose.yml up -d" in done.output
    assert "10.0.0.1:8000" in (tmp_path / "m" / "targets.yml").read_text()


def test_what_the_compose_file_mounts_is_there(tmp_path):
    write_monitoring(tmp_path)
    services = yaml.safe_load((tmp_path / "compose.yml").read_text())["services"]
    sources = [volume.split(":")[0] for service in services.values() for volume in service["volumes"]]
    for source in sources:
        if source.startswith("."):
            assert (tmp_path / source).exists(), source
    (data_source,) = yaml.safe_load((tmp_path / "grafana/provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert data_source["type"] == "prometheus"
    folder = yaml.safe_load((tmp_path / "grafana/provisioning/dashboards/onecard.yml").read_text())["providers"][0]
    mounted = [volume.split(":")[1] for volume in services["grafana"]["volumes"]]
    assert folder["options"]["path"] in mounted


def test_three_dashboards():
    assert BOARDS == ["card.json", "compare.json", "service.json"]
    assert len({board["uid"] for board in dashboards().values()}) == 3


@pytest.mark.parametrize("name", BOARDS)
def test_every_panel_says_what_it_shows_and_where_it_asks(name):
    board = dashboards()[name]
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        if panel["type"] == "row":
            continue
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        for asked in (panel, *panel["targets"]):
            assert asked["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    used = {found for panel in panels for t in panel.get("targets", ()) for found in re.findall(r"\$(\w+)", t["expr"])}
    assert used - {"__rate_interval"} <= set(variables)
    assert set(variables) - {"datasource"} <= used, "a list that changes nothing"


@pytest.mark.parametrize("name", BOARDS)
def test_panels_lie_side_by_side(name):
    taken: dict[tuple[int, int], str] = {}
    for panel in dashboards()[name]["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]


def test_only_metrics_that_exist_are_asked_for():
    expressions = [query.expression for query in panel_queries({})]
    expressions += [rule["expr"] for file in ("alerts", "recording") for rule in rules(file)]
    for expression in expressions:
        assert base_metrics(expression) <= set(all_metrics()), expression


def test_variables_are_filled_in():
    assert filled('rate(a{b=~"$b", c="${c}"}[$__rate_interval])', {"b": "x"}) == 'rate(a{b=~"x", c=".*"}[1m])'


def test_alerts_say_what_to_do():
    written = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text()
    for rule in rules("alerts"):
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "runbook"}
        assert len(rule["annotations"]["runbook"]) > 60
        assert f"`{rule['alert']}`" in written, "not in docs/metrics.md"

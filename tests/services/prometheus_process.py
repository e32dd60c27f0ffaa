"""A real Prometheus in a folder of its own, for tests: it scrapes what it is told to, and is asked over HTTP."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml

from onecard.telemetry.monitoring import write_monitoring

PROMETHEUS = shutil.which("prometheus")
PROMTOOL = shutil.which("promtool")
NOT_HERE = "prometheus and promtool are not here (Debian: apt-get install prometheus)"
T = TypeVar("T")


class Prometheus:
    """One that runs. Its answers are those of its HTTP API, version 1."""

    def __init__(self, port: int, output: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.output = output

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression gives now."""
        return self._ask("query", query=expression)["result"]

    def alerts(self) -> list[dict[str, Any]]:
        return self._ask("alerts")["alerts"]

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self._ask("rules")["groups"] for rule in group["rules"]]

    def metadata(self, metric: str) -> list[dict[str, Any]]:
        """What its pages say of a metric."""
        return self._ask("metadata", metric=metric)[metric]

    def label_values(self, label: str, selector: str) -> list[str]:
        return self._ask(f"label/{label}/values", **{"match[]": selector})

    def wait_for(self, look: Callable[[], T], what: str, limit_s: float = 90.0) -> T:
        """What ``look`` gives, once it is true."""
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                if found := look():
                    return found
            time.sleep(0.2)
        raise AssertionError(f"not within {limit_s:g} s: {what}\n{self.output.read_text()[-3000:]}")

    def _ask(self, path: str, **parameters: str) -> Any:
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{parameters}: {error.read().decode()}") from error


@contextlib.contextmanager
def watching(folder: Path, servers: dict[str, int]) -> Iterator[Prometheus]:
    """Our own files with shorter times, and Prometheus with them.

    Args:
        folder: for its files and data.
        servers: ports by the name that each has as ``instance``.
    """
    write_monitoring(folder)
    settings = yaml.safe_load((folder / "prometheus.yml").read_text())
    settings["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
    targets = [{"targets": [f"127.0.0.1:{port}"], "labels": {"instance": name}} for name, port in servers.items()]
    (folder / "targets.yml").write_text(yaml.safe_dump(targets))
    rules = yaml.safe_load((folder / "rules/alerts.yml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            rule.pop("for", None)
    (folder / "rules/alerts.yml").write_text(yaml.safe_dump(rules))
    port = free_port()
    assert PROMETHEUS is not None
    command = [PROMETHEUS, "--config.file=prometheus.yml", f"--web.listen-address=127.0.0.1:{port}"]
    output = folder / "output.txt"
    with output.open("w") as log:
        process = subprocess.Popen(
            [*command, "--storage.tsdb.path=data"], cwd=folder, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            prometheus = Prometheus(port, output)
            prometheus.wait_for(lambda: prometheus.query("up") or process.poll(), "the first scrape")
            assert process.poll() is None, output.read_text()
            yield prometheus
        finally:
            process.kill()
            process.wait(30)


def free_port() -> int:
    """One that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

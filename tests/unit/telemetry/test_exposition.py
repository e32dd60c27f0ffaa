"""The page that Prometheus reads, in both formats, read back by the reference parsers."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text

from onecard.telemetry.card_sample import CardSample
from onecard.telemetry.catalogue import all_metrics
from onecard.telemetry.catalogue_card import CARD_METRICS
from onecard.telemetry.exposition import expose
from onecard.telemetry.snapshot import FAILURE_REASONS, ModelFigures, ServerFigures, Snapshot
from onecard.telemetry.triton_names import TRITON_METRICS
from tests.services.synthetic_snapshots import snapshot

OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
LABELS = {
    *("model", "version", "variant", "reason", "device", "state", "bucket", "kind", "name", "process", "platform"),
    *("le", "gpu_uuid"),
}


def values(page: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """All samples of a page in the text format."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in read_text(page)
        for sample in family.samples
    }


def value(page: str, metric: str, /, **labels: str) -> float:
    return values(page)[metric, frozenset(labels.items())]


def text(shown: Snapshot, **words: str) -> str:
    return expose(shown, **words).body.decode()


MODEL = {"model": "resnet50", "version": "1"}


def test_figures_are_under_their_names():
    page = text(snapshot(7))
    assert value(page, "onecard_requests_answered_total", **MODEL) == 700
    assert value(page, "onecard_requests_failed_total", **MODEL, reason="bad_input") == 7
    assert value(page, "onecard_rows_total", **MODEL) == 2800
    assert value(page, "onecard_model_state", **MODEL, state="READY") == 1
    assert value(page, "onecard_model_state", **MODEL, state="LOADING") == 0
    assert value(page, "onecard_model_variant_info", **MODEL, bucket="B1", variant="cudagraph", device="cuda:0") == 1
    assert value(page, "onecard_build_info", version="0.1.0", platform="Linux x86_64") == 1
    assert value(page, "onecard_card_energy_joules_total", device="cuda:0") == 4200
    assert value(page, "onecard_card_energy_joules_total", device="cpu") == 630
    assert value(page, "onecard_card_ecc_errors_total", device="cuda:0", kind="corrected") == 7
    assert value(page, "onecard_card_throttle_reason", device="cuda:0", reason="sw_power_cap") == 1
    assert value(page, "onecard_process_resident_memory_bytes", process="engine") == 300 << 20


def test_histograms_are_cumulative():
    page = text(snapshot(2))
    name = "onecard_request_duration_seconds"
    assert value(page, f"{name}_bucket", **MODEL, le="0.01") == 0
    assert value(page, f"{name}_bucket", **MODEL, le="0.015") == 200
    assert value(page, f"{name}_bucket", **MODEL, le="60.0") == 200
    assert value(page, f"{name}_bucket", **MODEL, le="+Inf") == 200
    assert value(page, f"{name}_count", **MODEL) == 200
    assert value(page, f"{name}_sum", **MODEL) == pytest.approx(2.4)


def test_both_formats_say_the_same():
    plain, open_ = expose(snapshot(3)), expose(snapshot(3), OPENMETRICS)
    assert plain.content_type.startswith("text/plain; version=0.0.4")
    assert open_.content_type.startswith("application/openmetrics-text; version=1.0.0")
    found = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in read_openmetrics(open_.body.decode())
        for sample in family.samples
    }
    assert {key: number for key, number in found.items() if "le" not in dict(key[1])} == {
        key: number for key, number in values(plain.body.decode()).items() if "le" not in dict(key[1])
    }
    units = {family.name: family.unit for family in read_openmetrics(open_.body.decode())}
    assert units["onecard_request_duration_seconds"] == "seconds"
    assert units["onecard_card_energy_joules"] == "joules"
    assert units["onecard_requests_answered"] == ""


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text;version=abc",
        "application/openmetrics-text;version=1.0.0;version",
        "text/plain;version=\xff;escaping=?",
        "application/openmetrics-text;version=;escaping=,;;=,",
    ],
)
def test_a_form_that_nobody_can_read_is_no_fault_of_the_server(accept):
    page = expose(snapshot(3), accept)
    assert page.content_type and b"onecard_requests_answered_total" in page.body


def test_every_metric_is_there_when_all_is_known():
    both = text(snapshot(1)) + text(snapshot(1, on_cpu=True))
    shown = set(re.findall(r"^# TYPE (\w+)", both, re.MULTILINE))
    assert shown == set(all_metrics())


def test_what_is_not_known_is_absent_and_never_zero():
    page = text(Snapshot(time_s=1.0, server=ServerFigures(version="1"), models=(ModelFigures(name="a", version="1"),)))
    for word in ("sentinel", "card", "latency_target", "load_seconds", "skipped", "limit", "memory", "duration"):
        assert not [name for name, _ in values(page) if word in name.removeprefix("onecard")], word
    assert value(page, "onecard_requests_answered_total", model="a", version="1") == 0
    assert "nan" not in page.lower()


def test_reasons_are_there_before_the_first_failure():
    page = text(Snapshot(time_s=1.0, models=(ModelFigures(name="a", version="1"),)))
    for reason in FAILURE_REASONS:
        assert value(page, "onecard_requests_failed_total", model="a", version="1", reason=reason) == 0


def test_a_reason_of_any_form_makes_no_series_of_its_own():
    failures = {"no such file /tmp/1": 2, "no such file /tmp/2": 3, "x" * 41: 1, "out_of_disk": 4}
    page = text(Snapshot(time_s=1.0, models=(ModelFigures(name="a", version="1", failures=failures),)))
    assert value(page, "onecard_requests_failed_total", model="a", version="1", reason="other") == 6
    assert value(page, "onecard_requests_failed_total", model="a", version="1", reason="out_of_disk") == 4


def test_labels_hold_any_text():
    server = ServerFigures(version='1"\n\\é', platform="")
    assert value(text(Snapshot(time_s=1.0, server=server)), "onecard_build_info", version='1"\n\\é', platform="") == 1


def test_names_follow_the_conventions():
    for name, (metric, labels) in all_metrics().items():
        assert re.fullmatch(r"onecard_[a-z0-9_]+", name)
        assert name.endswith("_total") == (metric.kind == "counter"), name
        assert set(labels) <= LABELS, name
        assert metric.help.endswith("."), name
        for word in ("_ms_", "_us_", "_milliseconds_", "_mb_", "_percent_", "_joule_", "_watt_"):
            assert word not in f"{name}_", name


def test_every_sensor_is_shown():
    told = {"time_s", "lost", "energy_source", "past_throttle_reasons", "last_xid"}  # shown otherwise, or words alone
    for sensor in set(CardSample.__struct_fields__) - told:
        default = {"throttle_reasons": ("hw_thermal",), "kind": "nvidia", "name": "card"}.get(sensor, 1)
        sensors = {"kind": "nvidia", sensor: default}
        others = {"kind": "nvidia"}
        read = [metric.name for metric in CARD_METRICS if metric.read(sensors) != metric.read(others)]
        assert read or sensor == "kind", f"no metric shows the sensor {sensor}"


def test_a_card_that_does_not_say_its_device_is_called_by_its_kind():
    page = text(Snapshot(time_s=1.0, card={"kind": "cpu", "name": "some processor"}))
    assert value(page, "onecard_card_info", device="cpu", kind="cpu", name="some processor") == 1


def test_triton_names_are_added_on_demand_alone():
    assert "nv_" not in text(snapshot(3))
    page = text(snapshot(10, trouble=True), compatibility="triton")
    assert set(re.findall(r"^# TYPE (nv_\w+)", page, re.MULTILINE)) == {metric.name for metric in TRITON_METRICS}
    assert value(page, "onecard_rows_total", **MODEL) == 4000
    assert value(page, "nv_inference_request_success", **MODEL) == 1000
    assert value(page, "nv_inference_count", **MODEL) == 4000
    assert value(page, "nv_inference_exec_count", **MODEL) == 500
    assert value(page, "nv_inference_request_duration_us", **MODEL) == pytest.approx(120_000 * 1000)
    assert value(page, "nv_inference_compute_infer_duration_us", **MODEL) == pytest.approx(10_000 * 1000)
    assert value(page, "nv_inference_pending_request_count", **MODEL) == 95
    reasons = {"REJECTED": 400, "CANCELED": 100, "BACKEND": 200, "OTHER": 10}
    for reason, count in reasons.items():
        assert value(page, "nv_inference_request_failure", **MODEL, reason=reason) == count
    assert value(page, "nv_gpu_utilization", gpu_uuid="cuda:0") == 0.97
    assert value(page, "nv_cpu_utilization") == 0.8


def test_triton_names_without_a_gpu():
    page = text(snapshot(3, on_cpu=True), compatibility="triton")
    assert value(page, "nv_cpu_memory_total_bytes") == 16 << 30
    assert "nv_gpu" not in page
    bare = msgspec.structs.replace(snapshot(3), host=msgspec.UNSET)
    assert "nv_cpu" not in text(bare, compatibility="triton")


def test_triton_names_are_good_openmetrics_too():
    page = expose(snapshot(3), OPENMETRICS, "triton").body.decode()
    kinds = {family.name: family.type for family in read_openmetrics(page)}
    assert kinds["nv_inference_count"] == "unknown"
    assert kinds["nv_gpu_utilization"] == "gauge"


def test_the_documentation_names_every_metric_and_no_other():
    written = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text()
    documented = set(re.findall(r"^\| `(onecard_\w+)`", written, re.MULTILINE))
    assert documented == set(all_metrics())
    assert set(re.findall(r"`(nv_\w+)`", written)) == {metric.name for metric in TRITON_METRICS}

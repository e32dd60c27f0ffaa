"""The doctor: real findings here, and every fault shown to the check that must see it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from onecard import doctor
from onecard.backends import BACKENDS
from onecard.doctor import Finding, diagnose, exit_code
from onecard.evidence import CardState

LEVELS = {"ok", "note", "warning", "error"}


def test_diagnose_here():
    findings = diagnose()
    assert {f.level for f in findings} <= LEVELS
    assert {"python", "torch", "compiler", "headers", "threads", "disk", "openvino"} <= {f.area for f in findings}
    assert all(f.cure for f in findings if f.level in ("warning", "error"))
    assert next(f for f in findings if f.area == "python").level == "ok"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is usable here")
def test_diagnose_an_absent_card_is_a_finding():
    findings = diagnose("cuda")
    assert findings[0].area == "device"
    assert exit_code(findings) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is usable here")
def test_diagnose_the_card():
    findings = {f.area: f for f in diagnose("cuda:0")}
    assert findings["driver"].level in ("ok", "note")
    assert findings["architecture"].level == "ok"
    assert "temperature" in findings["card"].what


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is usable here")
def test_diagnose_starts_no_cuda():
    code = "import torch, onecard.doctor as d; d.diagnose('cuda:0'); assert not torch.cuda.is_initialized()"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_exit_code():
    assert exit_code([]) == 0
    assert exit_code([Finding("a", "ok", ""), Finding("b", "warning", ""), Finding("c", "note", "")]) == 0
    assert exit_code([Finding("a", "ok", ""), Finding("b", "error", "")]) == 1


@pytest.mark.parametrize(("version", "level"), [((3, 9), "error"), ((3, 10), "ok"), ((3, 14), "ok")])
def test_python(version, level):
    assert doctor.check_python(version).level == level


@pytest.mark.parametrize(
    ("version", "cuda", "cards", "wanted", "level"),
    [
        ("2.10.1+cpu", None, 0, "auto", "error"),
        ("2.11.0", "13.0", 1, "auto", "ok"),
        ("2.13.0+cpu", None, 0, "auto", "ok"),
        ("2.13.0+cpu", None, 1, "auto", "warning"),
        ("2.13.0+cpu", None, 1, "cuda:0", "error"),
        ("2.13.0+cpu", None, 1, "cpu", "ok"),
        ("2.14.0a0+git123", None, 0, "auto", "ok"),
        ("2.11", None, 0, "auto", "ok"),
    ],
)
def test_torch(version, cuda, cards, wanted, level):
    assert doctor.check_torch(version, cuda, cards, wanted).level == level


@pytest.mark.parametrize(
    ("cuda", "driver", "level"),
    [
        ("13.0", "580.65.06", "ok"),
        ("13.0", "580.65", "error"),
        ("13.0", "575.57.08", "error"),
        ("12.8", "535.183.01", "warning"),
        ("12.8", "570.124.06", "ok"),
        ("12.6", "470.82.01", "error"),
        ("12.9", "600.1", "ok"),
        ("14.7", "600.1", "note"),
        ("13.0", None, "warning"),
    ],
)
def test_driver(cuda, driver, level):
    assert doctor.check_driver(cuda, driver).level == level


def test_driver_on_windows_is_not_judged_by_linux_numbers():
    assert doctor.check_driver("13.0", "575.1", "win32").level == "note"


def test_the_table_names_its_sources():
    table = doctor.compatibility()
    assert table.source.startswith("https://docs.nvidia.com/")
    assert {"12.6", "12.8", "12.9", "13.0"} <= set(table.linux_drivers)


@pytest.mark.parametrize(
    ("capability", "architectures", "level"),
    [
        ("9.0", ["sm_80", "sm_90"], "ok"),
        ("8.9", ["sm_80", "sm_86", "sm_90"], "ok"),
        ("9.0", ["sm_80", "sm_90a"], "error"),
        ("8.0", ["sm_86"], "error"),
        ("12.0", ["sm_90", "sm_100"], "error"),
        ("12.0", ["sm_90", "compute_90"], "ok"),
        ("7.0", ["sm_75", "compute_75"], "error"),
        ("12.1", ["sm_120"], "ok"),
    ],
)
def test_architecture(capability, architectures, level):
    assert doctor.check_architecture(capability, architectures).level == level


def test_tools(tmp_path):
    assert doctor.check_triton(None, gpu=True).level == "warning"
    assert doctor.check_triton(None, gpu=False).level == "ok"
    assert doctor.check_triton("3.6.0", gpu=True).level == "ok"
    assert doctor.check_compiler(None).level == "warning"
    assert doctor.check_compiler("/usr/bin/g++").level == "ok"
    assert doctor.check_python_headers(tmp_path, gpu=True).level == "warning"
    (tmp_path / "Python.h").touch()
    assert doctor.check_python_headers(tmp_path, gpu=True).level == "ok"


def test_compiler_from_cxx(monkeypatch, tmp_path):
    compiler = tmp_path / "my-c++"
    compiler.touch(mode=0o755)
    monkeypatch.setenv("CXX", f"{compiler} -O2")
    assert doctor._compiler() == str(compiler)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._compiler() is None


def test_every_optional_engine_has_its_pip_cure():
    absent = {f.area: f for f in doctor.check_extras({})}
    for name in ("onnxruntime", "openvino", "tensorrt"):
        assert name in BACKENDS
        assert absent[name].level == "note"
        assert absent[name].cure == f"pip install 'onecard[{name}]'"
    present = {f.area: f for f in doctor.check_extras({"onnxruntime-gpu": "1.23"})}
    assert present["onnxruntime"].what == "onnxruntime-gpu 1.23"


def test_shared_memory():
    assert doctor.check_shared_memory(64 * 2**20).level == "warning"
    assert doctor.check_shared_memory(2**30).level == "ok"
    assert doctor.check_shared_memory(None).level == "note"


def test_threads():
    found = doctor.check_threads(1, 16, 1.5)
    assert found.level == "warning"
    assert found.cure == "export OMP_NUM_THREADS=1"
    assert "1.5" in found.what
    assert doctor.check_threads(4, 4, None).level == "ok"


def test_disk(tmp_path):
    assert doctor.check_disk(tmp_path, None).level == "error"
    assert doctor.check_disk(tmp_path, 2**30).level == "error"
    assert doctor.check_disk(tmp_path, 5 * 2**30).level == "warning"
    assert doctor.check_disk(tmp_path, 50 * 2**30).level == "ok"
    assert doctor._free_at(tmp_path / "not" / "yet") is not None
    (tmp_path / "file").touch()
    assert doctor._free_at(tmp_path / "file" / "below") is None
    assert doctor._size_of(Path("/there/is/no/such/folder")) is None


def test_card():
    assert doctor.check_card(False, CardState()).level == "warning"
    assert doctor.check_card(True, CardState(temperature_c=90, throttle=("hw_thermal",))).level == "warning"
    assert doctor.check_card(True, CardState(sm_clock_mhz=1980, throttle=("sw_power_cap",))).level == "ok"

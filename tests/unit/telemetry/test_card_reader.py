"""Which card ``cuda:N`` is: by CUDA_VISIBLE_DEVICES, by UUID, as a partition; and devices without sensors."""

from __future__ import annotations

import subprocess
import sys

import pytest

from onecard import nvml
from onecard.errors import UsageError
from onecard.telemetry.card_nvidia import AbsentCard, NvidiaReader
from onecard.telemetry.card_reader import read_card
from onecard.telemetry.card_sample import card_state
from onecard.telemetry.cpu_reader import CpuReader
from tests.unit.telemetry.card_fake_nvml import UUIDS, FakeNvml

POWER, MEMORY = "nvmlDeviceGetPowerUsage", "nvmlDeviceGetMemoryInfo"


@pytest.fixture
def lib(monkeypatch):
    lib = FakeNvml()
    monkeypatch.setattr(nvml, "library", lambda: lib)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    return lib


def asked_of(lib: FakeNvml, function: str) -> set[str]:
    return {args[0] for name, *args in lib.asked if name == function}


@pytest.mark.parametrize(
    ("visible", "device", "card", "part"),
    [
        (None, "cuda", "card0", "card0"),
        (None, "cuda:1", "card1", "card1"),
        ("1,0", "cuda:0", "card1", "card1"),
        ("1", "cuda", "card1", "card1"),
        (UUIDS["card1"], "cuda:0", "card1", "card1"),
        (f"0, {UUIDS['card1'][:9]}", "cuda:1", "card1", "card1"),  # shortened, as CUDA allows
        (UUIDS["part1"], "cuda:0", "card1", "part1"),
    ],
)
def test_visible_devices(lib, monkeypatch, visible, device, card, part):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    reader = read_card(device)
    assert isinstance(reader, NvidiaReader)
    reader.read()
    assert asked_of(lib, POWER) == {card}
    assert asked_of(lib, MEMORY) == {part}


@pytest.mark.parametrize(("visible", "device"), [("", "cuda:0"), ("0", "cuda:1"), ("-1", "cuda:0"), ("x", "cuda")])
def test_a_card_that_cuda_does_not_show_has_no_sensors(lib, monkeypatch, visible, device):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    reader = read_card(device)
    assert isinstance(reader, AbsentCard)
    assert card_state(reader.read()).keys() == {"time_s", "kind", "name"}
    reader.close()


@pytest.mark.parametrize("uuid", [UUIDS["card1"], UUIDS["card1"].removeprefix("GPU-")])
def test_the_uuid_that_torch_tells(lib, uuid):
    read_card("cuda:0", uuid=uuid).read()
    assert asked_of(lib, POWER) == asked_of(lib, MEMORY) == {"card1"}


@pytest.mark.parametrize("uuid", [UUIDS["part1"], UUIDS["part1"].removeprefix("MIG-")])
def test_the_uuid_of_a_partition(lib, uuid):
    read_card("cuda:0", uuid=uuid).read()
    assert asked_of(lib, POWER) == {"card1"}
    assert asked_of(lib, MEMORY) == {"part1"}


def test_no_driver(monkeypatch):
    monkeypatch.setattr(nvml, "library", lambda: None)
    sample = read_card("cuda:3").read()
    assert (sample.kind, sample.name) == ("nvidia", "cuda:3")
    assert "driver" in (sample.lost or "")
    assert card_state(sample).keys() == {"time_s", "kind", "name", "lost"}


def test_a_driver_without_a_card(lib, monkeypatch):
    monkeypatch.setattr(nvml, "count", lambda: 0)
    monkeypatch.setattr(nvml, "handle_by_order", lambda _: None)
    assert read_card("cuda:0").read().lost == "the NVIDIA driver sees no card"


def test_cpu():
    assert isinstance(read_card("cpu"), CpuReader)


@pytest.mark.parametrize("device", ["", "cuda:", "cuda:x", "cpu:0", "gpu", "cuda:-1", "cuda:0 "])
def test_other_devices_are_refused(device):
    with pytest.raises(UsageError, match="'cpu' or 'cuda:N'"):
        read_card(device)


def test_watching_costs_no_torch():
    code = """
import sys
import onecard.telemetry.sampler
assert not {"torch", "numpy", "pynvml"} & set(sys.modules)
from onecard.telemetry.card_reader import read_card
read_card("cuda:0").read(), read_card("cpu").read()
assert not {"torch", "numpy"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

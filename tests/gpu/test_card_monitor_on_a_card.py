"""The card monitor on a real card: its figures against torch's and nvidia-smi's."""

from __future__ import annotations

import shutil
import subprocess
import time

import pytest
import torch

from onecard.telemetry.card_nvidia import NvidiaReader
from onecard.telemetry.card_reader import read_card
from onecard.telemetry.card_sample import CardSample, card_state, energy_between
from onecard.telemetry.sampler import Sampler

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

DEVICE = "cuda:0"
GIB = 1 << 30


def keep_busy(seconds: float) -> None:
    matrix = torch.randn(4096, 4096, device=DEVICE, dtype=torch.float16)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        matrix = torch.nn.functional.normalize(matrix @ matrix)
        torch.cuda.synchronize()


def smi(uuid: str, *fields: str) -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", f"--id={uuid}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [text.strip() for text in done.stdout.strip().split(",")]


@pytest.fixture
def uuid() -> str:
    return f"GPU-{torch.cuda.get_device_properties(DEVICE).uuid}"


@pytest.fixture
def sample(uuid: str) -> CardSample:
    torch.zeros(1, device=DEVICE)
    reader = read_card(DEVICE, uuid=uuid)
    assert isinstance(reader, NvidiaReader)
    sample = reader.read()
    reader.close()
    print(card_state(sample))
    return sample


def test_the_sample_is_plausible(sample):
    assert sample.kind == "nvidia"
    assert sample.lost is None
    assert sample.name == torch.cuda.get_device_name(DEVICE)
    assert sample.utilisation is None or 0 <= sample.utilisation <= 1
    assert sample.temperature_c is None or 0 < sample.temperature_c < 120
    assert sample.memory_temperature_c is None or 0 < sample.memory_temperature_c < 130
    assert sample.power_w is None or 0 < sample.power_w < 2000
    assert sample.sm_clock_hz is None or 1e8 < sample.sm_clock_hz < 1e10
    assert sample.pcie_link_width is None or sample.pcie_link_width in (1, 2, 4, 8, 16, 32)
    assert sample.xid_errors in (None, 0)


def test_the_index_leads_to_the_same_card(sample):
    by_order = read_card(DEVICE)
    if not isinstance(by_order, NvidiaReader):
        pytest.skip("CUDA's order is not certain on this machine")
    assert by_order.read().memory_total_bytes == sample.memory_total_bytes


def test_memory_against_torch(uuid):
    reader = read_card(DEVICE, uuid=uuid)
    free, total = torch.cuda.mem_get_info(DEVICE)
    before = reader.read()
    assert before.memory_total_bytes == pytest.approx(total, rel=0.03)
    assert before.memory_used_bytes == pytest.approx(total - free, abs=GIB)
    block = torch.empty(4 * GIB, dtype=torch.uint8, device=DEVICE)
    grown = reader.read().memory_used_bytes - before.memory_used_bytes
    assert grown == pytest.approx(block.nbytes, abs=GIB // 2)
    del block
    torch.cuda.empty_cache()


def test_slow_figures_against_nvidia_smi(sample, uuid):
    if shutil.which("nvidia-smi") is None:
        pytest.skip("nvidia-smi is not on the PATH")
    total_mib, limit_w, temperature = smi(uuid, "memory.total", "enforced.power.limit", "temperature.gpu")
    if sample.power_limit_w is not None:
        assert sample.power_limit_w == pytest.approx(float(limit_w), abs=1.0)
    if sample.temperature_c is not None:
        assert sample.temperature_c == pytest.approx(float(temperature), abs=10.0)
    assert sample.memory_total_bytes == pytest.approx(float(total_mib) * (1 << 20), rel=0.01)


def test_work_shows_in_the_samples(uuid):
    with Sampler(read_card(DEVICE, uuid=uuid), period_s=0.2) as sampler:
        keep_busy(8.0)  # where the PCIe sensors cost processor time, there are few samples
        first, *_, last = sampler.history
        busiest = max((each.utilisation for each in sampler.history if each.utilisation is not None), default=None)
    assert not [each for each in sampler.history if each.lost]
    assert busiest is None or busiest > 0.3
    energy = energy_between(first, last)
    if energy is not None:  # a card with a power sensor
        watts = energy.joules / (last.time_s - first.time_s)
        assert 5 < watts < 2000
        if last.power_limit_w is not None:
            assert watts < 1.2 * last.power_limit_w

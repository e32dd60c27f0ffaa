"""The processor's sensors: energy counters that begin anew, control groups of both versions, a board's flags."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from onecard.measure import card as measured_card
from onecard.telemetry import cpu_reader
from onecard.telemetry.card_reader import read_card
from onecard.telemetry.card_sample import card_state, energy_between
from onecard.telemetry.cpu_board import board_throttle
from onecard.telemetry.cpu_energy import RaplEnergy
from onecard.telemetry.cpu_group import group_cpus, group_memory
from onecard.telemetry.cpu_processes import ProcessTree
from onecard.telemetry.cpu_reader import CpuReader

GIB = 1 << 30
RANGE_UJ = 262_143_328_850
RAPL = "sys/class/powercap"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def zone(name: str, label: str, microjoules: int) -> dict[str, str]:
    folder = f"{RAPL}/{name}"
    return {
        f"{folder}/name": f"{label}\n",
        f"{folder}/energy_uj": f"{microjoules}\n",
        f"{folder}/max_energy_range_uj": f"{RANGE_UJ}\n",
    }


class TestEnergy:
    def test_packages_and_memory_count_once(self, tmp_path):
        zones = {
            **{"intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:0:1": "uncore"},
            **{"intel-rapl:0:2": "dram", "intel-rapl:1": "package-1", "intel-rapl:2": "psys"},
            "intel-rapl-mmio:0": "package-0",  # the first package once more
        }
        for name, label in zones.items():
            write(tmp_path, zone(name, label, 1_000_000))
        energy = RaplEnergy(tmp_path)
        assert energy.read() == 0.0
        for index, name in enumerate(zones):
            write(tmp_path, zone(name, zones[name], 1_000_000 + 10**index * 1_000_000))
        assert energy.read() == pytest.approx(1 + 1000 + 10_000)

    def test_a_counter_that_begins_anew(self, tmp_path):
        write(tmp_path, zone("intel-rapl:0", "package-0", RANGE_UJ - 2_000_000))
        energy = RaplEnergy(tmp_path)
        for now_uj, joules in [(RANGE_UJ - 500_000, 1.5), (3_000_000, 5.0), (4_000_000, 6.0)]:
            write(tmp_path, zone("intel-rapl:0", "package-0", now_uj))
            assert energy.read() == pytest.approx(joules)

    def test_a_counter_that_fails_once_loses_nothing(self, tmp_path):
        write(tmp_path, zone("intel-rapl:0", "package-0", 0) | zone("intel-rapl:1", "package-1", 0))
        energy = RaplEnergy(tmp_path)
        write(tmp_path, zone("intel-rapl:0", "package-0", 1_000_000))
        (tmp_path / RAPL / "intel-rapl:1/energy_uj").unlink()
        assert energy.read() is None
        write(tmp_path, zone("intel-rapl:0", "package-0", 2_000_000) | zone("intel-rapl:1", "package-1", 5_000_000))
        assert energy.read() == pytest.approx(7.0)

    def test_what_cannot_be_read_is_absent(self, tmp_path):
        assert RaplEnergy(tmp_path).read() is None
        write(tmp_path, zone("intel-rapl:0", "package-0", 5))
        (tmp_path / RAPL / "intel-rapl:0/energy_uj").unlink()
        (tmp_path / RAPL / "intel-rapl:0/energy_uj").mkdir()  # as root may read all files, not one that is none
        assert RaplEnergy(tmp_path).read() is None


CPU_STAT_2 = "usage_usec 91\nuser_usec 90\nsystem_usec 1\nnr_periods 40\nnr_throttled 9\nthrottled_usec 2500000\n"
CPU_STAT_1 = "nr_periods 40\nnr_throttled 9\nthrottled_time 1500000000\n"


class TestGroups:
    def test_version_2(self, tmp_path):
        write(
            tmp_path,
            {
                "proc/self/cgroup": "0::/pod/box\n",
                "sys/fs/cgroup/cpu.stat": "usage_usec 1\n",
                "sys/fs/cgroup/pod/cpu.max": "150000 100000\n",
                "sys/fs/cgroup/pod/cpu.stat": CPU_STAT_2,
                "sys/fs/cgroup/pod/memory.max": f"{2 * GIB}\n",
                "sys/fs/cgroup/pod/memory.current": f"{GIB}\n",
                "sys/fs/cgroup/pod/box/cpu.max": "max 100000\n",
                "sys/fs/cgroup/pod/box/cpu.stat": CPU_STAT_2.replace("2500000", "0"),
                "sys/fs/cgroup/pod/box/memory.max": "max\n",
                "sys/fs/cgroup/pod/box/memory.current": "4096\n",
            },
        )
        assert group_cpus(tmp_path) == {"cgroup_cpus": 1.5, "cgroup_throttled_s": 2.5}
        limits = {"cgroup_memory_limit_bytes": 2 * GIB, "cgroup_memory_used_bytes": GIB}
        assert group_memory(8 * GIB, tmp_path) == limits

    def test_version_1(self, tmp_path):
        write(
            tmp_path,
            {
                "proc/self/cgroup": "3:memory:/box\n2:cpu,cpuacct:/box\n1:name=systemd:/\n",
                "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu,cpuacct/box/cpu.stat": CPU_STAT_1,
                "sys/fs/cgroup/memory/box/memory.limit_in_bytes": f"{GIB}\n",
                "sys/fs/cgroup/memory/box/memory.usage_in_bytes": "4096\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "123456789\n",
            },
        )
        assert group_cpus(tmp_path) == {"cgroup_cpus": 0.5, "cgroup_throttled_s": 1.5}
        assert group_memory(8 * GIB, tmp_path) == {"cgroup_memory_limit_bytes": GIB, "cgroup_memory_used_bytes": 4096}

    def test_no_limits(self, tmp_path):
        assert group_cpus(tmp_path) == group_memory(8 * GIB, tmp_path) == {}
        write(
            tmp_path,
            {
                "proc/self/cgroup": "1:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "123456789\n",
            },
        )
        assert group_memory(8 * GIB, tmp_path) == {}


class TestBoard:
    FILE = "sys/devices/platform/soc/soc:firmware/get_throttled"

    @pytest.mark.parametrize(
        ("text", "now", "past"),
        [
            ("0\n", (), ()),
            ("50005\n", ("under_voltage", "throttled"), ("under_voltage", "throttled")),
            ("0xa0000\n", (), ("frequency_capped", "soft_temperature_limit")),
            ("8\n", ("soft_temperature_limit",), ()),
        ],
    )
    def test_flags(self, tmp_path, text, now, past):
        write(tmp_path, {self.FILE: text})
        assert board_throttle(tmp_path) == {"throttle_reasons": now, "past_throttle_reasons": past}

    def test_another_machine(self, tmp_path):
        assert board_throttle(tmp_path) == {}


def test_a_machine_with_all_sensors(tmp_path, monkeypatch):
    monkeypatch.setattr(measured_card.psutil, "sensors_temperatures", dict, raising=False)
    write(
        tmp_path,
        {
            "proc/cpuinfo": "Model\t\t: Raspberry Pi 4 Model B Rev 1.4\n",
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/cpu.max": "200000 100000\n",
            "sys/fs/cgroup/cpu.stat": CPU_STAT_2,
            "sys/fs/cgroup/memory.max": "1048576\n",
            "sys/fs/cgroup/memory.current": "4096\n",
            "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
            "sys/class/thermal/thermal_zone0/temp": "48312\n",
            TestBoard.FILE: "50000\n",
            **zone("intel-rapl:0", "package-0", 0),
        },
    )
    reader = CpuReader(ProcessTree(), tmp_path)
    first = reader.read()
    write(tmp_path, zone("intel-rapl:0", "package-0", 12_000_000))
    sample = reader.read()
    assert (sample.kind, sample.name) == ("cpu", "Raspberry Pi 4 Model B Rev 1.4")
    assert (sample.temperature_c, sample.throttle_reasons) == (48.312, ())
    assert sample.past_throttle_reasons == ("under_voltage", "throttled")
    assert (sample.cgroup_cpus, sample.cgroup_throttled_s) == (2.0, 2.5)
    assert (sample.cgroup_memory_limit_bytes, sample.cgroup_memory_used_bytes) == (1048576, 4096)
    assert energy_between(first, sample) == (pytest.approx(12.0), "counter")


def test_a_sensor_that_raises_takes_no_other_with_it(tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("no such file")

    monkeypatch.setattr(cpu_reader.psutil, "virtual_memory", broken)
    write(tmp_path, {TestBoard.FILE: "no number\n"})
    sample = CpuReader(ProcessTree(), tmp_path).read()
    assert sample.memory_total_bytes is sample.throttle_reasons is None
    assert sample.cores == psutil.cpu_count()


def test_this_machine_is_plausible():
    reader = read_card("cpu")
    before = time.monotonic(), time.process_time()
    first = reader.read()
    began = time.monotonic()
    assert first.utilisation is first.process_utilisation is None  # there is nothing to compare with yet
    end = time.process_time() + 0.5
    while time.process_time() < end:
        sum(range(1000))
    ended = time.monotonic()
    sample = reader.read()
    after = time.monotonic(), time.process_time()
    took = sample.time_s - first.time_s
    assert took >= 0.4
    assert sample.name
    assert sample.cores == psutil.cpu_count()
    assert 0 < sample.utilisation <= 1
    # The machine may stall between any two lines: it is of no less and no more than what lies around it.
    busy = sample.process_utilisation * sample.cores
    assert 0.4 / (after[0] - before[0]) <= busy <= (after[1] - before[1] + 0.2) / (ended - began)
    assert sample.memory_total_bytes == psutil.virtual_memory().total
    assert 0 < sample.memory_used_bytes < sample.memory_total_bytes
    assert sample.frequency_hz is None or 1e8 < sample.frequency_hz < 1e10
    assert sample.temperature_c is None or -40 < sample.temperature_c < 150
    assert sample.energy_j is None or 0 <= sample.energy_j < 2000 * took
    assert sample.cgroup_cpus is None or 0 < sample.cgroup_cpus <= 4096
    assert not {"lost", "power_w", "sm_clock_hz", "xid_errors"} & card_state(sample).keys()

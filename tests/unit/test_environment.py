"""The environment: what is detected here, limits read from other machines' files, cache keys, differences."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from onecard import environment, host, nvml
from onecard.environment import Card, Environment, detect, differences, fingerprint, resolve_device
from onecard.errors import UsageError

GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not GPU, reason="no CUDA device is usable here")

CPU_ENVIRONMENT = Environment(
    device="cpu",
    card=None,
    cpu="A processor",
    cpu_flags=("avx2", "avx512f"),
    cores=4,
    threads=4,
    memory_bytes=16 * 2**30,
    versions={"python": "3.11.7", "torch": "2.13.0"},
)
GPU_ENVIRONMENT = msgspec.structs.replace(
    CPU_ENVIRONMENT,
    device="cuda:0",
    card=Card("NVIDIA H200", "9.0", 140 * 2**30, "580.65.06"),
    versions={"python": "3.11.7", "torch": "2.11.0", "cuda": "13.0"},
)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_import_costs_no_torch():
    code = "import sys, onecard.environment; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_detect_cpu():
    found = detect("cpu")
    assert found.device == "cpu"
    assert found.card is None
    assert found.cpu
    assert found.cores >= 1
    assert found.threads == torch.get_num_threads()
    assert found.memory_bytes > 2**28
    assert found.versions["torch"] == torch.__version__
    assert found.versions["python"] == sys.version.split()[0]
    assert {"onecard", "numpy"} <= set(found.versions)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Environment) == found


def test_detect_survives_an_absent_package(monkeypatch):
    monkeypatch.setitem(environment.PACKAGES, "nothing", ("there-is-no-such-distribution",))
    assert "nothing" not in detect("cpu").versions


@needs_gpu
def test_detect_gpu_agrees_with_torch_and_starts_no_cuda():
    code = (
        "import torch; from onecard.environment import detect; e = detect('cuda:0');"
        "assert not torch.cuda.is_initialized(); p = torch.cuda.get_device_properties(0);"
        "assert e.card.name == p.name and e.card.compute_capability == f'{p.major}.{p.minor}', e.card;"
        "assert abs(e.card.memory_bytes / p.total_memory - 1) < 0.05, e.card; assert e.card.driver != 'unknown';"
        "assert e.versions['cudnn'] == str(torch.backends.cudnn.version())"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_detect_refuses_a_card_that_is_not_there():
    with pytest.raises(UsageError, match="cuda:99"):
        detect("cuda:99")


class TestHost:
    def test_flags_and_model_of_a_server(self, tmp_path):
        root = write(
            tmp_path, {"proc/cpuinfo": "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2 amx_tile\n"}
        )
        assert host.cpu_model(root) == "AMD EPYC"
        assert host.cpu_flags(root) == ("avx2", "amx_tile")

    def test_flags_and_model_of_a_raspberry_pi(self, tmp_path):
        text = "processor\t: 0\nFeatures\t: fp asimd evtstrm crc32 cpuid\nModel\t\t: Raspberry Pi 4 Model B\n"
        root = write(tmp_path, {"proc/cpuinfo": text})
        assert host.cpu_model(root) == "Raspberry Pi 4 Model B"
        assert host.cpu_flags(root) == ("asimd",)

    def test_no_proc(self, tmp_path):
        assert host.cpu_model(tmp_path)
        assert host.cpu_flags(tmp_path) == ()
        assert host.cpu_quota(tmp_path) is None

    def test_version_2_takes_the_tightest_limit_on_the_way_up(self, tmp_path):
        root = write(
            tmp_path,
            {
                "proc/self/cgroup": "0::/pod/container\n",
                "sys/fs/cgroup/pod/container/cpu.max": "max 100000\n",
                "sys/fs/cgroup/pod/cpu.max": "150000 100000\n",
                "sys/fs/cgroup/pod/memory.max": "1000000\n",
                "sys/fs/cgroup/pod/container/memory.max": "max\n",
            },
        )
        assert host.cpu_quota(root) == 1.5
        assert host.usable_cores(root) == 1
        assert host.usable_memory(root) == 1_000_000

    def test_version_1_in_a_container_whose_path_is_the_hosts(self, tmp_path):
        root = write(
            tmp_path,
            {
                "proc/self/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000000\n",
            },
        )
        assert host.cpu_quota(root) == 0.5
        assert host.usable_cores(root) == 1
        assert host.usable_memory(root) == 2_000_000

    def test_version_1_without_a_limit(self, tmp_path):
        root = write(
            tmp_path,
            {
                "proc/self/cgroup": "1:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
        )
        assert host.cpu_quota(root) is None

    def test_cache_folder(self, monkeypatch, tmp_path):
        monkeypatch.setenv("ONECARD_CACHE", str(tmp_path))
        assert host.cache_folder() == tmp_path
        monkeypatch.delenv("ONECARD_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert host.cache_folder() == tmp_path / "onecard"


class TestResolveDevice:
    @pytest.mark.skipif(GPU, reason="a GPU is usable here")
    def test_auto_without_a_gpu(self):
        assert resolve_device("auto") == "cpu"
        with pytest.raises(UsageError, match="the devices are cpu"):
            resolve_device("cuda")

    @needs_gpu
    def test_auto_with_a_gpu(self):
        assert resolve_device("auto") == resolve_device("cuda") == resolve_device(" CUDA:0 ") == "cuda:0"

    @pytest.mark.parametrize("text", ["", "gpu", "tpu", "cuda:x", "cuda:99", "cuda:-1", "cpu:1"])
    def test_unknown(self, text):
        with pytest.raises(UsageError, match="the devices are cpu"):
            resolve_device(text)

    def test_cpu(self):
        assert resolve_device("cpu") == "cpu"


class TestFingerprint:
    def test_is_stable_and_ignores_order(self):
        turned = msgspec.structs.replace(
            CPU_ENVIRONMENT, cpu_flags=("avx512f", "avx2"), versions={"torch": "2.13.0", "python": "3.11.7"}
        )
        assert fingerprint(turned) == fingerprint(CPU_ENVIRONMENT)
        assert len(fingerprint(turned)) == 64

    @pytest.mark.parametrize(
        "change",
        [{"cores": 8}, {"threads": 1}, {"cpu": "Another"}, {"cpu_flags": ()}, {"versions": {"torch": "2.11.0"}}],
    )
    def test_what_changes_it(self, change):
        assert fingerprint(msgspec.structs.replace(CPU_ENVIRONMENT, **change)) != fingerprint(CPU_ENVIRONMENT)

    @pytest.mark.parametrize("field", ["name", "compute_capability", "driver"])
    def test_the_card_changes_it(self, field):
        card = msgspec.structs.replace(GPU_ENVIRONMENT.card, **{field: "other"})
        assert fingerprint(msgspec.structs.replace(GPU_ENVIRONMENT, card=card)) != fingerprint(GPU_ENVIRONMENT)

    def test_what_does_not(self):
        same = msgspec.structs.replace(
            CPU_ENVIRONMENT, memory_bytes=1, versions={**CPU_ENVIRONMENT.versions, "cuda": "1"}
        )
        assert fingerprint(same) == fingerprint(CPU_ENVIRONMENT)
        assert fingerprint(msgspec.structs.replace(GPU_ENVIRONMENT, device="cuda:1")) == fingerprint(GPU_ENVIRONMENT)

    def test_cuda_matters_on_a_gpu(self):
        other = msgspec.structs.replace(GPU_ENVIRONMENT, versions={**GPU_ENVIRONMENT.versions, "cuda": "12.8"})
        assert fingerprint(other) != fingerprint(GPU_ENVIRONMENT)


class TestDifferences:
    def test_none(self):
        assert differences(CPU_ENVIRONMENT, CPU_ENVIRONMENT) == []
        assert differences(GPU_ENVIRONMENT, msgspec.structs.replace(GPU_ENVIRONMENT, device="cuda:1")) == []

    def test_lines(self):
        lines = differences(GPU_ENVIRONMENT, CPU_ENVIRONMENT)
        assert "torch 2.11.0 → 2.13.0" in lines
        assert "device cuda → cpu" in lines
        assert "card NVIDIA H200 → absent" in lines
        assert "cuda 13.0 → absent" in lines
        assert not [line for line in lines if line.startswith(("python", "cores"))]


def test_nvml_without_a_card_says_none():
    if nvml.count():
        pytest.skip("there is an NVIDIA card here")
    assert nvml.driver_version() is None
    assert nvml.facts(0) is None
    assert nvml.handle_by_order(0) is None
    assert nvml.handle_by_uuid("GPU-x") is None

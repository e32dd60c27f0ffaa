"""Facts of two machines on which all is well, and facts with a fault in them."""

from __future__ import annotations

from typing import Any

import msgspec

from onecard.doctor import Facts, Finding
from onecard.doctor.facts import Card, Compilers, Driver, Memory, Processor, Software, Torch
from onecard.evidence import CardState

GIB = 2**30
EVERYTHING = {
    "numpy": "2.4.6",
    "onnx": "1.23.2",
    "onnxscript": "0.7.2",
    "openvino": "2026.4.1",
    "nncf": "3.4.0",
    "torchao": "0.18.0",
    "torch_pruning": "1.6.1",
    "torchvision": "0.28.0",
    "timm": "1.0.20",
    "transformers": "5.23.0",
    "uvloop": "0.23.0",
    "grpcio": "1.85.1",
    "protobuf": "7.36.2",
}
H200 = Card(
    index=0,
    name="NVIDIA H200",
    uuid="GPU-11111111-2222-3333-4444-555555555555",
    compute_capability="9.0",
    memory_bytes=141 * GIB,
    mig=False,
    persistence=True,
    ecc=True,
    uncorrected=0,
    power_limit_w=700.0,
    power_default_w=700.0,
    clock_limit_mhz=1980,
    clock_default_mhz=1980,
    state=CardState(temperature_c=35, sm_clock_mhz=1980, utilisation=0.0),
)
ON_A_CPU = Facts(
    wanted="auto",
    device="cpu",
    no_device=None,
    software=Software(
        python=(3, 12),
        system="linux",
        machine="x86_64",
        packages={**EVERYTHING, "onnxruntime": "1.32.0"},
        torch=Torch(version="2.13.0+cpu", threads=8),
        compilers=Compilers("/usr/bin/g++", "/usr/bin/gcc", 20, "", True, "/usr/include/python3.12"),
    ),
    processor=Processor(
        cores=8, governors=("powersave",), scaling_driver="intel_pstate", energy_preferences=("balance_performance",)
    ),
    memory=Memory(usable_bytes=64 * GIB, available_bytes=60 * GIB, shared_bytes=8 * GIB, locked_bytes=None),
    driver=Driver(error=12),
    open_files=65536,
    cache="/home/user/.cache/onecard",
    cache_free_bytes=100 * GIB,
)
ON_A_CARD = msgspec.structs.replace(
    ON_A_CPU,
    device="cuda:0",
    software=msgspec.structs.replace(
        ON_A_CPU.software,
        packages={
            **EVERYTHING,
            "triton": "3.7.1",
            "onnxruntime-gpu": "1.31.1",
            "torch_tensorrt": "2.13.0",
            "tensorrt": "11.0.0.114",
        },
        torch=Torch(
            version="2.13.0",
            cuda="13.0",
            cudnn="9.20.0",
            architectures=("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"),
            usable=True,
            threads=8,
        ),
    ),
    driver=Driver(version="580.95.05", module="580.95.05", on_bus=1, cards=(H200,), chosen=0),
)


def with_(facts: Facts, part: str = "", **changes: Any) -> Facts:
    """The same machine with something changed.

    Args:
        facts: of the machine.
        part: where the change is: ``software``, ``software.torch``, or nothing for the facts themselves.
        **changes: fields and their new values.
    """

    def changed(struct: Any, path: list[str]) -> Any:
        if not path:
            return msgspec.structs.replace(struct, **changes)
        return msgspec.structs.replace(struct, **{path[0]: changed(getattr(struct, path[0]), path[1:])})

    result: Facts = changed(facts, [name for name in part.split(".") if name])
    return result


def with_card(**changes: Any) -> Facts:
    """The machine with a card, whose card is another."""
    return with_(ON_A_CARD, "driver", cards=(msgspec.structs.replace(H200, **changes),))


def with_packages(facts: Facts, **versions: str | None) -> Facts:
    """Other versions of packages (``torch_tensorrt``, ``onnxruntime_gpu``); None for a package that is not there."""
    found = dict(facts.software.packages)
    for name, version in versions.items():
        key = "onnxruntime-gpu" if name == "onnxruntime_gpu" else name
        found.pop(key, None)
        if version is not None:
            found[key] = version
    return with_(facts, "software", packages=found)


def trouble(findings: list[Finding]) -> list[Finding]:
    """What is not well, nor merely good to know."""
    return [finding for finding in findings if finding.level in ("warning", "error")]

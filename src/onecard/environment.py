"""What a variant was made and measured on: the card, the processor and the versions that matter."""

from __future__ import annotations

import msgspec


class Card(msgspec.Struct, frozen=True):
    """One GPU: name, compute capability as ``9.0``, memory in bytes, driver version."""

    name: str
    compute_capability: str
    memory_bytes: int
    driver: str


class Environment(msgspec.Struct, frozen=True):
    """The machine and the software; two equal environments give comparable figures.

    Args:
        device: ``cpu`` or ``cuda:0`` ...
        card: the GPU, or None on a CPU.
        cpu: the processor's model name.
        cpu_flags: the instruction sets that decide which kernels are used (avx2, avx512_vnni, amx_bf16 ...).
        cores: cores that this process may use (affinity and cgroup limit).
        threads: intra-op threads that were used.
        memory_bytes: main memory that this process may use.
        versions: package name to version, for those installed (python, torch, triton, onnxruntime ...).
    """

    device: str
    card: Card | None
    cpu: str
    cpu_flags: tuple[str, ...]
    cores: int
    threads: int
    memory_bytes: int
    versions: dict[str, str]

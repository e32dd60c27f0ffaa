"""Checks of the machine around the card: cores, clocks, memory, limits and disk."""

from __future__ import annotations

from onecard.doctor.facts import Facts
from onecard.doctor.finding import Finding

MIB, GIB = 2**20, 2**30
SHARED_MINIMUM = 256 * MIB
LOCKED_MINIMUM = 64 * MIB
MEMORY_MINIMUM = 4 * GIB
AVAILABLE_MINIMUM = 2 * GIB
SWAP_WARNING = GIB
OPEN_FILES_MINIMUM = 4096
DISK_MINIMUM = 2 * GIB
DISK_COMFORTABLE = 10 * GIB

_OWN_CLOCK_DRIVERS = ("intel_pstate", "amd-pstate-epp", "amd_pstate_epp")
"""Under these the processor sets its clocks itself, and 'powersave' is the usual name for that."""

_SAVING = ("power", "balance_power")


def check_threads(facts: Facts) -> list[Finding]:
    """Does torch use as many threads as it has cores?"""
    processor, torch = facts.processor, facts.software.torch
    cores, quota = processor.cores, processor.quota
    limit = f" (the control group grants {quota:g})" if quota is not None else ""
    threads = torch.threads if torch and torch.threads else _first_number(processor.omp_threads)
    if threads and threads > cores:
        what = f"torch uses {threads} threads on {cores} usable cores{limit}."
        why = "They wait for each other, and the kernel puts the process to sleep: often many times slower."
        return [Finding("threads", "warning", what, why, f"export OMP_NUM_THREADS={cores}")]
    if quota is not None and quota < 1:
        what = f"the control group grants {quota:g} cores."
        why = "The process is put to sleep for part of every period, so that latencies have a long tail."
        cure = "Give it a whole core or more: docker run --cpus=2 (Kubernetes: resources.limits.cpu: 2)."
        return [Finding("threads", "warning", what, why, cure)]
    if processor.omp_threads and threads and threads < cores and not facts.gpu:
        what = f"OMP_NUM_THREADS={processor.omp_threads}: torch uses {threads} of {cores} usable cores."
        why = "Variants on the CPU are slower than they need be, unless other cores are meant for others."
        return [Finding("threads", "note", what, why, "unset OMP_NUM_THREADS")]
    if not threads:
        return []
    return [Finding("threads", "ok", f"{threads} threads on {cores} usable cores{limit}")]


def _first_number(text: str | None) -> int:
    """The threads of the outermost level: OMP_NUM_THREADS may be a list, ``4,2``."""
    first = (text or "").partition(",")[0].strip()
    return int(first) if first.isdigit() else 0


def check_clock_governor(facts: Facts) -> list[Finding]:
    """Does the kernel let the processor's clocks go up?"""
    processor = facts.processor
    slow = [name for name in processor.energy_preferences if name in _SAVING]
    itself = processor.scaling_driver in _OWN_CLOCK_DRIVERS
    found = ""
    if "powersave" in processor.governors and not itself:
        found = "the clock governor is 'powersave'"
    elif itself and slow and "performance" not in processor.governors:
        found = f"the processor is told to prefer '{slow[0]}'"
    if not found:
        return [Finding("clocks", "ok", f"governor {', '.join(processor.governors)}")] if processor.governors else []
    why = "Cores run at low clocks, or rise to high ones late: figures are low and do not repeat."
    cure = "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
    return [Finding("clocks", "warning", f"{found} ({processor.scaling_driver}).", why, cure)]


def check_memory(facts: Facts) -> list[Finding]:
    """Is there main memory enough, and is it not lying on a disk?"""
    memory = facts.memory
    if not memory.usable_bytes:
        return []
    found = []
    if memory.usable_bytes < MEMORY_MINIMUM:
        by = "its control group lets this process have" if memory.limited else "this machine has"
        what = f"{by} {_gib(memory.usable_bytes)} of main memory."
        why = "torch with one engine takes 1 to 2 GiB; a search has several processes, and a build may be killed."
        cure = "docker run --memory=8g (Kubernetes: resources.limits.memory)." if memory.limited else "Add memory."
        found.append(Finding("memory", "warning", what, why, cure))
    elif memory.available_bytes is not None and memory.available_bytes < AVAILABLE_MINIMUM:
        what = f"only {_gib(memory.available_bytes)} of main memory are free."
        why = "A search or a server may be killed for want of memory, or be pushed onto the disk."
        found.append(
            Finding(
                "memory", "warning", what, why, "ps aux --sort=-rss | head shows who holds it; stop what is not needed."
            )
        )
    if memory.swap_used_bytes > SWAP_WARNING:
        what = f"{_gib(memory.swap_used_bytes)} of memory lie in swap."
        why = "What is read back from a disk makes pauses in every measurement and every answer."
        found.append(Finding("swap", "warning", what, why, "Free main memory, then: sudo swapoff -a && sudo swapon -a"))
    return found or [Finding("memory", "ok", f"{_gib(memory.usable_bytes)} of main memory")]


def check_shared_memory(facts: Facts) -> list[Finding]:
    """Is /dev/shm large enough? Containers get 64 MiB unless told otherwise."""
    size = facts.memory.shared_bytes
    if size is None:
        why = "Clients cannot hand their tensors over in system shared memory."
        return [Finding("shared memory", "note", "there is no /dev/shm here.", why, "mount -t tmpfs tmpfs /dev/shm")]
    if size < SHARED_MINIMUM:
        what = f"/dev/shm is {size / MIB:,.0f} MiB; {SHARED_MINIMUM / MIB:,.0f} MiB or more are wanted."
        why = "PyTorch's data loaders, NCCL and clients' shared memory live there (onecard's own segments do not)."
        cure = "docker run --shm-size=1g (Kubernetes: an emptyDir with medium: Memory at /dev/shm)."
        return [Finding("shared memory", "warning", what, why, cure)]
    return [Finding("shared memory", "ok", f"/dev/shm is {size / MIB:,.0f} MiB")]


def check_locked_memory(facts: Facts) -> list[Finding]:
    """May memory be locked, for copies to and from the card?"""
    locked = facts.memory.locked_bytes
    if not facts.gpu:
        return []
    if locked is not None and locked < LOCKED_MINIMUM:
        what = f"a process may lock {locked / 1024:,.0f} KiB of memory (ulimit -l)."
        why = "NVIDIA's driver mostly locks memory outside of this limit, but NCCL over InfiniBand is held to it."
        cure = "ulimit -l unlimited (docker run --ulimit memlock=-1; systemd: LimitMEMLOCK=infinity)."
        return [Finding("locked memory", "note", what, why, cure)]
    limit = "no limit" if locked is None else f"up to {locked / MIB:,.0f} MiB"
    return [Finding("locked memory", "ok", f"{limit} on locked memory")]


def check_open_files(facts: Facts) -> list[Finding]:
    """May a server have its connections open?"""
    most = facts.open_files
    if most is not None and most < OPEN_FILES_MINIMUM:
        what = f"a process may have {most} files open (ulimit -n)."
        why = "A server has one for each connection (1,000 by default), and more for its models and shared memory."
        cure = "ulimit -n 65536 (docker run --ulimit nofile=65536; systemd: LimitNOFILE=65536)."
        return [Finding("open files", "note", what, why, cure)]
    return [Finding("open files", "ok", "no limit on open files" if most is None else f"{most:,} open files")]


def check_disk(facts: Facts) -> list[Finding]:
    """Is there room for compile caches and bundles?"""
    free = facts.cache_free_bytes
    cure = "onecard cache --prune 30d, or export ONECARD_CACHE=/a/folder/on/another/disk"
    if free is None:
        why = "A search keeps there what it builds and finds."
        return [
            Finding(
                "disk", "error", f"{facts.cache} cannot be written.", why, "export ONECARD_CACHE=/a/folder/of/yours"
            )
        ]
    what = f"{free / GIB:.1f} GiB free for {facts.cache}"
    if free < DISK_MINIMUM:
        return [Finding("disk", "error", f"only {what}.", "A search will not end.", cure)]
    if free < DISK_COMFORTABLE:
        return [Finding("disk", "warning", f"only {what}.", "A search with large models may fill it.", cure)]
    return [Finding("disk", "ok", what)]


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.1f} GiB"

"""What is known of a machine: gathered once, frozen, and all that the checks look at.

None stands for what this system does not tell. No check asks the machine itself, so that every fault can be shown
to its check by replacing a fact.
"""

from __future__ import annotations

import msgspec

from onecard.evidence import CardState

COMPUTE_PROHIBITED, COMPUTE_EXCLUSIVE = 2, 3  # NVML_COMPUTEMODE_*


class Torch(msgspec.Struct, frozen=True):
    """torch as it is installed here.

    Args:
        version: as torch gives it, ``2.13.0+cpu``; empty if it cannot be imported.
        broken: why it cannot be imported, in its own words.
        cuda: the CUDA that it is built with, or None.
        cudnn: the cuDNN that it loads, as ``9.20.0``.
        architectures: ``torch.cuda.get_arch_list()``: ``sm_90`` (binary), ``compute_90`` (PTX). Empty without a card.
        usable: whether it finds a card that it can use.
        complaint: what it said when it looked for one.
        threads: its intra-op threads.
    """

    version: str = ""
    broken: str = ""
    cuda: str | None = None
    cudnn: str | None = None
    architectures: tuple[str, ...] = ()
    usable: bool = False
    complaint: str = ""
    threads: int = 0


class Compilers(msgspec.Struct, frozen=True):
    """What there is to build with.

    Args:
        cxx: the C++ compiler's path.
        cc: the C compiler's path, which Triton's launchers are built with.
        cpp: the C++ standard of the trial, 17 or 20.
        complaint: what the C++ compiler said to a few lines with OpenMP in them; empty if it took them, None untried.
        headers: whether ``Python.h`` is in ``include``.
        include: the folder of this Python's C headers.
    """

    cxx: str | None = None
    cc: str | None = None
    cpp: int = 17
    complaint: str | None = None
    headers: bool = False
    include: str = ""


class Software(msgspec.Struct, frozen=True):
    """Versions and tools.

    Args:
        python: its major and minor version.
        system: ``sys.platform``.
        machine: ``x86_64``, ``aarch64``.
        packages: package to version, for those installed of the ones that matter; torch is not among them.
        torch: None if nobody asked for it.
        compilers: to build with.
    """

    python: tuple[int, int]
    system: str
    machine: str
    packages: dict[str, str]
    torch: Torch | None
    compilers: Compilers


class Processor(msgspec.Struct, frozen=True):
    """The processor and what this process may have of it.

    Args:
        cores: that the process may keep busy.
        quota: cores' worth of time that the control group grants, or None.
        omp_threads: ``OMP_NUM_THREADS`` as it stands in the environment.
        governors: how the kernel sets the cores' clocks, each once: ``performance``, ``powersave`` ...
        scaling_driver: which driver sets them: ``intel_pstate``, ``amd-pstate-epp``, ``acpi-cpufreq`` ...
        energy_preferences: what the processor itself is told to prefer, each once: ``balance_performance`` ...
    """

    cores: int
    quota: float | None = None
    omp_threads: str | None = None
    governors: tuple[str, ...] = ()
    scaling_driver: str | None = None
    energy_preferences: tuple[str, ...] = ()


class Memory(msgspec.Struct, frozen=True):
    """Main memory and limits on it, in bytes.

    Args:
        usable_bytes: that the process may use at all: the machine's, or less by a control group.
        available_bytes: free now or easily freed, on the machine.
        swap_used_bytes: of the machine's memory that lies on a disk now.
        shared_bytes: the size of ``/dev/shm``; None where there is none.
        locked_bytes: the limit on locked memory (``ulimit -l``); None for no limit.
        limited: whether a control group limits it.
    """

    usable_bytes: int
    available_bytes: int | None = None
    swap_used_bytes: int = 0
    shared_bytes: int | None = None
    locked_bytes: int | None = None
    limited: bool = False


class Card(msgspec.Struct, frozen=True):
    """One NVIDIA card as its driver describes it.

    Args:
        index: the driver's number of it, as nvidia-smi shows it.
        name: of the product.
        uuid: ``GPU-...``.
        compute_capability: ``9.0``.
        memory_bytes: all of it.
        mig: whether it is cut into partitions (MIG); None where it cannot be.
        partitions: the UUIDs of its partitions, ``MIG-...``.
        persistence: whether the driver keeps it started while nobody uses it.
        compute_mode: one of NVML's; 0 lets any process in.
        ecc: whether its memory's errors are corrected; None where it cannot.
        uncorrected: errors since the driver started that could not be corrected.
        remap_failed: whether a broken row of its memory could not be replaced.
        remap_pending: whether a broken row is replaced at the next reset.
        power_limit_w: that holds now; power_default_w: that it came with.
        clock_limit_mhz: the SM clock that applications are held to; clock_default_mhz: that it came with.
        state: one reading of its sensors.
    """

    index: int
    name: str
    uuid: str = ""
    compute_capability: str = ""
    memory_bytes: int = 0
    mig: bool | None = None
    partitions: tuple[str, ...] = ()
    persistence: bool | None = None
    compute_mode: int = 0
    ecc: bool | None = None
    uncorrected: int | None = None
    remap_failed: bool = False
    remap_pending: bool = False
    power_limit_w: float | None = None
    power_default_w: float | None = None
    clock_limit_mhz: float | None = None
    clock_default_mhz: float | None = None
    state: CardState = CardState()


class Driver(msgspec.Struct, frozen=True):
    """NVIDIA's driver and the cards that it shows.

    Args:
        version: of its libraries, ``580.65.06``; None if they cannot be asked.
        module: the version of the loaded kernel module.
        error: the number of NVML's error if it did not start, else None.
        on_bus: NVIDIA display controllers on the PCI bus, whether or not this process may use them.
        cards: those that the driver shows to this process.
        visible: ``CUDA_VISIBLE_DEVICES`` as it stands in the environment; None if it does not.
        chosen: the :attr:`Card.index` of the card that ``Facts.device`` means; None if that is not certain.
    """

    version: str | None = None
    module: str | None = None
    error: int | None = None
    on_bus: int = 0
    cards: tuple[Card, ...] = ()
    visible: str | None = None
    chosen: int | None = None

    @property
    def present(self) -> bool:
        """Whether there is an NVIDIA card at all, usable or not."""
        return bool(self.cards) or self.on_bus > 0


class Facts(msgspec.Struct, frozen=True):
    """All that the checks look at.

    Args:
        wanted: the device as the user named it.
        device: the concrete one, ``cpu`` or ``cuda:N``; as wanted where there is no such device.
        no_device: why there is no such device, and the cure; None if there is.
        software: versions and tools.
        processor: cores and clocks.
        memory: main memory.
        driver: the NVIDIA driver and its cards.
        open_files: how many files and connections the process may have open (``ulimit -n``); None for no limit.
        cache: the folder for what can be made again.
        cache_free_bytes: free there; None if it cannot be written.
        unknown: what could not be found out, and why.
    """

    wanted: str
    device: str
    no_device: tuple[str, str] | None
    software: Software
    processor: Processor
    memory: Memory
    driver: Driver
    open_files: int | None
    cache: str
    cache_free_bytes: int | None
    unknown: dict[str, str] = {}

    @property
    def gpu(self) -> bool:
        """Whether a GPU is asked for, or chosen."""
        return self.device.startswith("cuda")

    @property
    def card(self) -> Card | None:
        """The card that the device means, if it is known."""
        return next((card for card in self.driver.cards if card.index == self.driver.chosen and self.gpu), None)

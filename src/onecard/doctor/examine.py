"""The visit: every check over the same facts, in the order in which a fault would spoil the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from onecard.doctor import check_card, check_driver, check_machine, check_software
from onecard.doctor.check_bundle import bundle_device, check_bundle
from onecard.doctor.facts import Facts
from onecard.doctor.finding import Finding
from onecard.doctor.gather import gather

Check = Callable[[Facts], list[Finding]]

CHECKS: Mapping[str, Check] = {
    "device": check_driver.check_device,
    "python": check_software.check_python,
    "torch": check_software.check_torch,
    "driver library": check_driver.check_nvml,
    "driver": check_driver.check_driver,
    "visible cards": check_driver.check_visible,
    "mig": check_driver.check_mig,
    "architecture": check_software.check_architecture,
    "ecc": check_card.check_memory_errors,
    "modes": check_card.check_modes,
    "limits": check_card.check_clocks,
    "card": check_card.check_sensors,
    "triton": check_software.check_triton,
    "compiler": check_software.check_compiler,
    "headers": check_software.check_headers,
    "versions": check_software.check_packages,
    "onnxruntime": check_software.check_onnxruntime,
    "extras": check_software.check_extras,
    "threads": check_machine.check_threads,
    "clocks": check_machine.check_clock_governor,
    "memory": check_machine.check_memory,
    "shared memory": check_machine.check_shared_memory,
    "locked memory": check_machine.check_locked_memory,
    "open files": check_machine.check_open_files,
    "disk": check_machine.check_disk,
}
"""Every check by what it looks at."""

_REPORT = "Please report it, with what 'onecard doctor --json' prints."


class Visit(msgspec.Struct, frozen=True):
    """What was found out, and what is to be said of it."""

    facts: Facts
    findings: tuple[Finding, ...]


def visit(device: str = "auto", bundle: Path | None = None, *, load: bool = False) -> Visit:
    """Look at this machine, and at a bundle on it.

    Args:
        device: as :func:`onecard.environment.resolve_device` takes it; one that is not there is a finding.
        bundle: a bundle's folder; ``auto`` then is where it was made for, if that is here.
        load: load every variant of the bundle.
    """
    torch_works = True
    wanted = device
    if bundle is not None:
        try:
            wanted = bundle_device(bundle, device)
        except ImportError:  # torch; its check says so
            torch_works = False
    facts = gather(wanted)
    findings = examine(facts)
    if bundle is not None and torch_works and facts.no_device is None:
        folder = bundle
        findings += examine(facts, {"bundle": lambda known: check_bundle(folder, known.device, load=load)})
    return Visit(facts, tuple(findings))


def examine(facts: Facts, checks: Mapping[str, Check] = CHECKS) -> list[Finding]:
    """Run every check. One that fails is a finding of its own, as is a fact that could not be found out."""
    found = [
        Finding(name, "warning", f"could not be looked at: {problem}", "A fault there would not be seen.", _REPORT)
        for name, problem in facts.unknown.items()
    ]
    for name, check in checks.items():
        try:
            found += check(facts)
        except Exception as error:  # a doctor that faints helps nobody
            what = f"could not be checked: {type(error).__name__}: {error}"
            found.append(Finding(name, "warning", what, "A fault there would not be seen.", _REPORT))
    return found

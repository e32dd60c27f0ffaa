"""Checks of NVIDIA's driver: it is there, fits its own libraries and torch's CUDA, and shows the card asked for."""

from __future__ import annotations

from onecard.doctor.compatibility import compatibility
from onecard.doctor.facts import Driver, Facts
from onecard.doctor.finding import Finding, Level
from onecard.doctor.versions import numbers

_NO_PERMISSION, _NOT_LOADED, _NO_LIBRARY, _LOST, _MISMATCH = 4, 9, 12, 15, 18  # NVML_ERROR_*
_IN_A_CONTAINER = "In a container: docker run --gpus all, with NVIDIA_DRIVER_CAPABILITIES=compute,utility."


def check_device(facts: Facts) -> list[Finding]:
    """Is the device that the user named there?"""
    torch = facts.software.torch
    if facts.no_device is not None:
        message, cure = facts.no_device
        if facts.wanted.startswith("cuda") and not (torch and torch.usable):
            cure = "Mend what is found below about torch and the driver, or pass --device cpu."
        return [Finding("device", "error", message, "Nothing can run on it.", cure)]
    if torch and torch.cuda and torch.complaint and facts.wanted != "cpu" and facts.driver.present:
        what = f"CUDA does not start: {torch.complaint}"
        cure = "Mend what is found about the driver below; 'nvidia-smi' must work."
        return [Finding("device", "error", what, "The card is not used.", cure)]
    return [Finding("device", "ok", facts.device)]


def check_nvml(facts: Facts) -> list[Finding]:
    """Does the driver answer, and do its libraries fit its kernel module?"""
    driver = facts.driver
    if driver.error is None or (driver.error == _NO_LIBRARY and not driver.present):
        return []
    level: Level = "error" if facts.gpu else "note" if facts.wanted == "cpu" else "warning"
    if driver.error == _MISMATCH:
        what = f"NVML error 18: the driver's libraries are not those of the loaded kernel module ({driver.module})."
        why = "The driver was updated and its old module is still loaded: no program can start CUDA."
        cure = (
            "sudo reboot, or with nothing on the card: "
            "sudo rmmod nvidia_uvm nvidia_drm nvidia_modeset nvidia && sudo modprobe nvidia"
        )
        return [Finding("driver", level, what, f"{why} A container must get its host's libraries.", cure)]
    said = {
        _NO_LIBRARY: ("there is an NVIDIA card, but no driver library here.", f"Install the driver. {_IN_A_CONTAINER}"),
        _NOT_LOADED: ("the NVIDIA driver is installed, but its kernel module is not loaded.", "sudo modprobe nvidia"),
        _NO_PERMISSION: ("this user may not use the NVIDIA driver.", "Look at the rights of /dev/nvidia*."),
        _LOST: ("the NVIDIA card fell off the bus.", "sudo reboot; then look at the card's power and seat."),
    }
    what, cure = said.get(driver.error, (f"NVML does not start: error {driver.error}.", "See what nvidia-smi says."))
    return [Finding("driver", level, what, "The card cannot be used.", cure)]


def check_driver(facts: Facts) -> list[Finding]:
    """Is the driver new enough for torch's CUDA?"""
    driver, torch = facts.driver, facts.software.torch
    if driver.error is not None or not driver.cards or torch is None or torch.cuda is None:
        return []
    table = compatibility()
    need = table.linux_drivers.get(torch.cuda)
    if driver.version is None:
        why = "Whether it is new enough for torch's CUDA is not known."
        return [Finding("driver", "warning", "the NVIDIA driver's version cannot be read.", why, "Try nvidia-smi.")]
    if need is None or facts.software.system != "linux":
        what = f"driver {driver.version}; CUDA {torch.cuda} on {facts.software.system} is not in onecard's table."
        why = "Whether it is new enough is not known."
        return [Finding("driver", "note", what, why, f"See {table.url('cuda-drivers')}.")]
    if numbers(driver.version) < numbers(need.minimum):
        what = f"driver {driver.version} is too old for CUDA {torch.cuda}, which needs {need.minimum}."
        cure = f"Install driver {need.full} or newer, or a torch for an older CUDA; see {table.url(need.source)}."
        return [Finding("driver", "error", what, "CUDA does not start.", cure)]
    if numbers(driver.version) < numbers(need.full):
        what = f"driver {driver.version} is older than CUDA {torch.cuda}'s own, {need.full}."
        why = f"It runs all the same, without its newest features and its PTX ({table.url('cuda-minor-versions')})."
        return [Finding("driver", "note", what, why, f"Install driver {need.full} or newer.")]
    return [Finding("driver", "ok", f"driver {driver.version} for CUDA {torch.cuda}")]


def check_visible(facts: Facts) -> list[Finding]:
    """Does ``CUDA_VISIBLE_DEVICES`` name cards that are there?"""
    text = facts.driver.visible
    if text is None or not facts.driver.cards or facts.wanted == "cpu":
        return []
    level: Level = "error" if facts.wanted.startswith("cuda") else "warning"
    entries = [entry.strip() for entry in text.split(",")]
    bad = next((entry for entry in entries if not _is_there(entry, facts.driver)), None)
    if text.strip() in ("", "-1"):
        what, why = f"CUDA_VISIBLE_DEVICES='{text}' hides every card.", "No card is used."
        return [Finding("visible cards", level, what, why, "unset CUDA_VISIBLE_DEVICES")]
    there = ", ".join(str(card.index) for card in facts.driver.cards)
    if bad is not None:
        what = f"CUDA_VISIBLE_DEVICES='{text}' names '{bad}', which is not there (there are: {there})."
        why = "CUDA does not see that card, nor any that is named behind it."
        return [Finding("visible cards", level, what, why, "export CUDA_VISIBLE_DEVICES=0, or unset it.")]
    if len(set(entries)) < len(entries):
        what, why = f"CUDA_VISIBLE_DEVICES='{text}' names a card twice.", "CUDA then sees no card at all."
        return [Finding("visible cards", level, what, why, "Name each card once.")]
    return [Finding("visible cards", "ok", f"CUDA_VISIBLE_DEVICES={text}")]


def _is_there(entry: str, driver: Driver) -> bool:
    if entry.isdigit():
        return any(card.index == int(entry) for card in driver.cards)
    uuids = [uuid for card in driver.cards for uuid in (card.uuid, *card.partitions)]
    return entry.startswith(("GPU-", "MIG-")) and any(uuid.startswith(entry) for uuid in uuids)


def check_mig(facts: Facts) -> list[Finding]:
    """Is a card that is cut into partitions (MIG) usable, and is one of them chosen?"""
    if facts.wanted == "cpu":
        return []
    found = []
    for card in facts.driver.cards:
        if not card.mig:
            continue
        if not card.partitions:
            level: Level = "error" if len(facts.driver.cards) == 1 else "warning"
            what = f"card {card.index} ({card.name}) is in MIG mode and has no partition."
            cure = (
                f"sudo nvidia-smi -i {card.index} -mig 0 (whole card), or "
                f"sudo nvidia-smi mig -i {card.index} -lgip, then -cgi PROFILE -C (a partition)."
            )
            found.append(Finding("mig", level, what, "CUDA sees no device on it.", cure))
        elif len(card.partitions) > 1 and "MIG-" not in (facts.driver.visible or ""):
            what = f"card {card.index} ({card.name}) has {len(card.partitions)} partitions and none is chosen."
            why = "CUDA takes the first one, and a process can use one only."
            cure = f"export CUDA_VISIBLE_DEVICES={card.partitions[0]}"
            found.append(Finding("mig", "note", what, why, cure))
        else:
            found.append(Finding("mig", "ok", f"card {card.index} is cut into {len(card.partitions)} partitions"))
    return found

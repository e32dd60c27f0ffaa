"""Checks of what is installed: Python, torch, engines and compilers, against each other."""

from __future__ import annotations

from collections.abc import Mapping

from onecard.doctor.compatibility import Compatibility, Mismatch, compatibility, mismatches
from onecard.doctor.facts import Facts, Software
from onecard.doctor.finding import Finding
from onecard.doctor.versions import numbers, satisfies
from onecard.environment import GPU_ONLY

PYTHON_MINIMUM = (3, 10)
TORCH_MINIMUM = (2, 11)
EXTRAS: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
    "openvino": ("openvino", "nncf"),
    "tensorrt": ("torch_tensorrt",),
    "quantize": ("torchao",),
    "pruning": ("torch_pruning",),
    "vision": ("torchvision", "timm"),
    "hf": ("transformers",),
    "serve": ("uvloop", "grpcio", "protobuf"),
}
"""Extras of onecard, each with its packages; ``onnxruntime-gpu`` may stand for ``onnxruntime``."""

_GET_TORCH = "https://pytorch.org/get-started/locally/"
_INDEX = "https://download.pytorch.org/whl"
_FROM_TORCH = ("torch", "cuda", "cudnn")  # what cannot be installed by itself to mend a pair


def check_python(facts: Facts) -> list[Finding]:
    """Is Python new enough for onecard, and one that this torch is made for?"""
    have = _dotted(facts.software.python)
    if facts.software.python < PYTHON_MINIMUM:
        why = "onecard uses what older versions lack."
        cure = f"Install Python {_dotted(PYTHON_MINIMUM)} or newer, and onecard with it."
        return [Finding("python", "error", f"Python {have} is too old.", why, cure)]
    row = compatibility().release(facts.software.torch.version) if facts.software.torch else None
    if row and not satisfies(have, f">={row.python[0]},<={row.python[1]}"):
        what = f"Python {have}, but this torch is published for {row.python[0]} to {row.python[1]}."
        why = "Compiled parts of torch, or of packages beside it, may be missing."
        cure = f"Use Python {row.python[1]}, or another torch; see {compatibility().url(row.source)}."
        return [Finding("python", "warning", what, why, cure)]
    return [Finding("python", "ok", f"Python {have}")]


def check_torch(facts: Facts) -> list[Finding]:
    """Can torch be imported, is it new enough, and built for the card that is there?"""
    torch = facts.software.torch
    if torch is None:
        return []
    if not torch.version:
        what = f"torch cannot be imported: {torch.broken or facts.unknown.get('torch', 'no reason was given')}"
        cure = f"pip install --force-reinstall 'torch>={_dotted(TORCH_MINIMUM)}' (or see {_GET_TORCH})"
        return [Finding("torch", "error", what, "Everything here runs through torch.", cure)]
    if numbers(torch.version)[:2] < TORCH_MINIMUM:
        why, cure = "onecard uses what older versions lack.", f"pip install 'torch>={_dotted(TORCH_MINIMUM)}'"
        return [Finding("torch", "error", f"torch {torch.version} is too old.", why, cure)]
    if torch.cuda is None and facts.driver.cards and facts.wanted != "cpu":
        what = f"torch {torch.version} is built without CUDA, but there is an NVIDIA card."
        why = "The card is not used at all."
        return [Finding("torch", "error" if facts.gpu else "warning", what, why, _with_cuda())]
    text = f"torch {torch.version}" + (f" (CUDA {torch.cuda})" if torch.cuda else "")
    if torch.cuda is None and facts.gpu:
        why = "It cannot use an NVIDIA card, if there is one."
        return [Finding("torch", "error", f"{text} is built without CUDA.", why, _with_cuda())]
    if compatibility().release(torch.version) is None:
        why = "What goes with it is judged by older versions."
        return [Finding("torch", "note", f"{text} is not in onecard's table.", why, "pip install -U onecard")]
    return [Finding("torch", "ok", text)]


def _with_cuda() -> str:
    return f"pip install --force-reinstall torch --index-url {_INDEX}/cu130 (other builds: {_GET_TORCH})"


def check_architecture(facts: Facts) -> list[Finding]:
    """Has torch kernels for this card?"""
    card, torch = facts.card, facts.software.torch
    if card is None or torch is None or not card.compute_capability or not torch.architectures:
        return []
    served = serving(card.compute_capability, torch.architectures)
    if served:
        return [Finding("architecture", "ok", f"compute capability {card.compute_capability} is served by {served}")]
    what = (
        f"this torch has no kernels for {card.name}, compute capability {card.compute_capability} "
        f"(it has {', '.join(torch.architectures)})."
    )
    why = "Every operation on the card ends with 'no kernel image is available'."
    return [Finding("architecture", "error", what, why, _build_for(card.compute_capability, facts.software))]


def serving(capability: str, architectures: tuple[str, ...]) -> str:
    """Which of torch's architectures runs on a compute capability, or nothing.

    A binary (``sm_80``) runs on its own major capability from its minor upward, PTX (``compute_80``) on all that are
    newer. ``sm_90a`` and its like are additions to a plain ``sm_90``.
    """
    card = numbers(capability)
    for name in architectures:
        kind, _, digits = name.partition("_")
        if not digits.isdigit():
            continue
        built = divmod(int(digits), 10)
        if (kind == "sm" and built[0] == card[0] and built[1] <= card[1]) or (kind == "compute" and built <= card):
            return name
    return ""


def _build_for(capability: str, software: Software) -> str:
    """How to get a torch with kernels for a card."""
    builds = compatibility().torch_builds.get(software.machine, {})
    fits = [
        cuda
        for cuda, built in builds.items()
        if serving(capability, tuple(f"sm_{text.replace('.', '')}" for text in built))
    ]
    if not fits:
        return f"Build torch from source with TORCH_CUDA_ARCH_LIST={capability}, or use another card."
    return f"pip install --force-reinstall torch --index-url {_INDEX}/cu{fits[-1].replace('.', '')}"


def check_packages(facts: Facts) -> list[Finding]:
    """Do the installed versions go together, by the table?"""
    table = compatibility()
    torch = facts.software.torch
    found = dict(facts.software.packages)
    if torch and torch.version:
        known = {"torch": torch.version, "cuda": torch.cuda, "cudnn": torch.cudnn}
        found |= {name: version for name, version in known.items() if version}
    if not facts.gpu:
        found = {name: version for name, version in found.items() if name not in GPU_ONLY}
    broken = mismatches(found, table)
    if not broken:
        return [Finding("versions", "ok", "the installed packages go together")] if torch else []
    return [
        Finding(
            "versions",
            "warning",
            f"{pair.package} {pair.version} goes with {pair.other} {pair.bounds}, not with {pair.other_version}.",
            f"Loading or compiling with it may fail, or parts of it stay off ({pair.url}).",
            _mend(pair, found, table),
        )
        for pair in broken
    ]


def _mend(pair: Mismatch, found: Mapping[str, str], table: Compatibility) -> str:
    """The command that brings a pair together; torch stays as it is."""
    if pair.package == "torch" or pair.other not in _FROM_TORCH:
        return f"pip install '{pair.other.replace('_', '-')}{pair.bounds}'"
    for row in table.pairs:
        if row.package == pair.package and all(
            satisfies(found[other], bounds)
            for other, bounds in row.needs.items()
            if other in _FROM_TORCH and other in found
        ):
            return f"pip install '{row.package.replace('_', '-')}{row.versions}'"
    return f"Install a {pair.package} for {pair.other} {pair.other_version}; see {pair.url}."


def check_onnxruntime(facts: Facts) -> list[Finding]:
    """Is there one ONNX Runtime, and the one for the card?"""
    both = {"onnxruntime", "onnxruntime-gpu"} & set(facts.software.packages)
    again = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'onecard[{}]'"
    if len(both) > 1:
        what = "onnxruntime and onnxruntime-gpu are both installed."
        why = "They share one folder: which of the two is there is chance, and the CUDA provider may be missing."
        cure = again.format("onnxruntime-gpu" if facts.gpu else "onnxruntime")
        return [Finding("onnxruntime", "warning", what, why, cure)]
    if facts.gpu and both == {"onnxruntime"}:
        what = f"onnxruntime {facts.software.packages['onnxruntime']} is the build without CUDA."
        why = "ONNX Runtime's variants on the card are not tried."
        return [Finding("onnxruntime", "note", what, why, again.format("onnxruntime-gpu"))]
    return []


def check_extras(facts: Facts) -> list[Finding]:
    """Which optional parts are there?"""
    found = facts.software.packages
    result = []
    for extra, packages in EXTRAS.items():
        names = [_present(name, found) for name in packages]
        missing = [name for name in names if name not in found]
        if extra == "tensorrt" and missing and not facts.gpu:
            continue
        if missing:
            what = f"not installed: {', '.join(missing)}."
            why = f"What the extra '{extra}' brings is left out."
            result.append(Finding(extra, "note", what, why, f"pip install 'onecard[{_extra_for(extra, facts)}]'"))
        else:
            result.append(Finding(extra, "ok", ", ".join(f"{name} {found[name]}" for name in names)))
    return result


def _present(name: str, found: Mapping[str, str]) -> str:
    return "onnxruntime-gpu" if name == "onnxruntime" and name not in found and "onnxruntime-gpu" in found else name


def _extra_for(extra: str, facts: Facts) -> str:
    return "onnxruntime-gpu" if extra == "onnxruntime" and facts.gpu else extra


def check_triton(facts: Facts) -> list[Finding]:
    """Is Triton there, which torch.compile needs on a GPU?"""
    if not facts.gpu:
        return []
    version = facts.software.packages.get("triton")
    if version:
        return [Finding("triton", "ok", f"triton {version}")]
    why = "torch.compile and onecard's own kernels cannot run on the GPU."
    return [Finding("triton", "warning", "triton is not installed.", why, _triton(facts.software))]


def _triton(software: Software) -> str:
    version = software.torch.version if software.torch else ""
    rows = [
        p.needs["triton"]
        for p in compatibility().pairs
        if p.package == "torch" and "triton" in p.needs and version and satisfies(version, p.versions)
    ]
    return f"pip install 'triton{rows[0]}'" if rows else "pip install triton"


def check_compiler(facts: Facts) -> list[Finding]:
    """Is there a C++ compiler that builds what torch generates, and a C compiler for Triton?"""
    tools = facts.software.compilers
    install = "apt-get install -y g++ (or set CXX to another compiler)"
    if tools.cxx is None:
        why = "torch.compile on a CPU and AOTInductor cannot build; their variants are left out."
        return [Finding("compiler", "warning", "there is no C++ compiler.", why, install)]
    found = []
    if tools.complaint:
        what = f"{tools.cxx} cannot build C++{tools.cpp} with OpenMP: {tools.complaint}"
        why = "torch.compile on a CPU and AOTInductor build their kernels so, and will fail."
        found.append(Finding("compiler", "warning", what, why, install))
    if facts.gpu and tools.cc is None:
        why = "Triton builds the launchers of its kernels with it."
        found.append(
            Finding("compiler", "warning", "there is no C compiler.", why, "apt-get install -y gcc (or set CC)")
        )
    return found or [Finding("compiler", "ok", f"C++ compiler {tools.cxx}")]


def check_headers(facts: Facts) -> list[Finding]:
    """Are Python's C headers there, which Triton's launcher and inductor's wrapper include?"""
    tools = facts.software.compilers
    if tools.headers:
        return [Finding("headers", "ok", f"Python headers in {tools.include}")]
    why = f"torch.compile cannot build {'its launchers' if facts.gpu else 'its wrapper'}."
    cure = f"apt-get install -y python{_dotted(facts.software.python)}-dev (for the Python that runs onecard)"
    return [Finding("headers", "warning", f"Python.h is not in {tools.include}.", why, cure)]


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))

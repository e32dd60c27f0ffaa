"""Imports run downward only: which package may import which, and what importing onecard may not do."""

from __future__ import annotations

import ast
import functools
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import onecard

ROOT = Path(onecard.__file__).parent
BASE = {
    "errors": set(),
    "host": set(),
    "nvml": set(),
    "quiet": set(),
    "spec": {"errors"},
    "recipe": set(),
    "units": {"errors"},
    "reference": {"errors"},
    "arrays": {"errors"},
    "inputs": {"spec"},
    "device_memory": {"errors", "host", "nvml", "units"},
    "environment": {"errors", "host", "nvml"},
    "evidence": {"environment", "recipe", "spec"},
    "tuning": {"environment", "errors"},
    "arrivals": set(),
    "cache": {"errors"},
}
_BASE = set(BASE)
ALLOWED: dict[str, set[str]] = {
    **BASE,
    "models": _BASE,
    "calibration": {*_BASE, "models", "verify"},
    "transforms": {*_BASE, "models", "calibration"},
    "backends": {*_BASE, "models", "transforms", "calibration", "streaming"},
    "training": {*_BASE, "models", "transforms", "verify", "measure"},
    "verify": _BASE,
    "measure": _BASE,
    "bundle": {*_BASE, "backends", "transforms", "verify"},
    "search": {*_BASE, "models", "transforms", "backends", "calibration", "verify", "measure", "bundle"},
    "kernels": set(),
    "memory": {*_BASE, "models", "transforms", "measure", "bundle", "search"},
    "streaming": {*_BASE, "models"},
    "runtime": {*_BASE, "models", "backends", "bundle", "kernels", "verify"},
    "report": _BASE,
    "doctor": {*_BASE, "bundle", "measure"},
    "telemetry": {*_BASE, "measure", "report"},
    "bench": {*_BASE, "report", "runtime", "server", "verify"},
    "listing": {*_BASE, "bundle", "report"},
    "live": _BASE,
    "publish": {*_BASE, "bundle", "report", "search", "verify"},
    "api": {*_BASE, "models", "search", "bundle", "verify", "publish"},
    "api_training": {*_BASE, "api", "models", "training", "verify"},
    "cli_training": {*_BASE, "models", "training"},
    "cli_prune": {*_BASE, "cli_training", "models", "training", "verify"},
    "api_tuning": {*_BASE, "bundle", "report", "runtime"},
    "cli_runtime": {*_BASE, "api_tuning", "report", "runtime"},
    "ipc": _BASE,
    "server": {*_BASE, "ipc", "runtime", "telemetry"},
    "cli_serve": {*_BASE, "ipc", "server"},
    "cli_bench": {*_BASE, "bench"},
    "cli_mlperf": {*_BASE, "bench", "report"},
    "cli_cache": {*_BASE, "report"},
    "cli_dashboards": {*_BASE, "telemetry"},
    "cli_monitor": {*_BASE, "server", "telemetry"},
    "cli_memory": {*_BASE, "memory", "report"},
    "cli": {
        *_BASE,
        *("api", "bundle", "cli_memory", "cli_prune", "cli_runtime", "cli_serve", "cli_training", "report"),
        *("cli_bench", "cli_cache", "cli_dashboards", "cli_mlperf", "cli_monitor", "doctor", "listing", "live"),
    },
    "__main__": {"cli"},
    "onecard": {"errors"},  # __init__.py; what it names in its table is imported when it is first used
}


def imports_of(node: ast.AST) -> Iterator[str]:
    """Dotted names of all imports below a node but those for the type checker alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in child.orelse:
                yield from imports_of(other)
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative imports hide what is imported"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        yield from imports_of(child)


@functools.cache
def found_imports() -> dict[str, dict[str, str]]:
    """Package to the packages it imports, each with a file that does."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted(ROOT.rglob("*.py")):
        place = path.relative_to(ROOT)
        package = place.parts[0] if len(place.parts) > 1 else place.stem.replace("__init__", "onecard")
        for name in imports_of(ast.parse(path.read_text())):
            top, _, rest = name.partition(".")
            imported = rest.split(".")[0]
            if top == "onecard" and imported not in (package, "__version__"):
                found.setdefault(package, {})[imported] = str(place)
    return found


def test_every_package_is_listed():
    there = {
        p.name if p.is_dir() else p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert there - {"__init__"} == set(ALLOWED) - {"onecard"}


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_only_what_is_below(package):
    forbidden = {name: file for name, file in found_imports().get(package, {}).items() if name not in ALLOWED[package]}
    assert not forbidden, f"{package} may not import {forbidden}"


def test_no_permission_is_left_over():
    found = found_imports()
    unused = {package: ALLOWED[package] - _BASE - set(found.get(package, {})) for package in ALLOWED}
    assert not {package: names for package, names in unused.items() if names}


def test_the_layers_hold_no_cycle():
    list(graphlib.TopologicalSorter(ALLOWED).static_order())


HEAVY = {"torch", "numpy", "triton", "pynvml", "psutil", "onnx", "onnxruntime", "openvino", "tensorrt", "transformers"}


def run_fresh(code: str) -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""


def test_import_is_light_and_leaves_logging_alone():
    run_fresh(f"""
import logging, os, sys, warnings
root = logging.getLogger()
before = (list(root.handlers), root.level, dict(os.environ), list(warnings.filters), list(sys.path))
import onecard
assert not {HEAVY} & set(sys.modules)
assert before == (list(root.handlers), root.level, dict(os.environ), list(warnings.filters), list(sys.path))
assert not any(getattr(logger, "handlers", []) for logger in root.manager.loggerDict.values())
""")


@pytest.mark.parametrize("module", ["spec", "recipe", "evidence", "errors", "backends", "transforms", "api", "cli"])
def test_vocabulary_and_tables_cost_no_torch(module):
    run_fresh(f"import sys, onecard.{module}; assert not {{'torch', 'onnxruntime', 'openvino'}} & set(sys.modules)")


def test_importing_all_of_it_starts_no_cuda_and_no_engine():
    run_fresh("""
import importlib, pathlib, sys, warnings
warnings.simplefilter("ignore")  # deprecations inside other packages
import onecard
root = pathlib.Path(onecard.__file__).parent
for path in sorted(root.rglob("*.py")):
    parts = path.relative_to(root.parent).with_suffix("").parts
    importlib.import_module(".".join(p for p in parts if p != "__init__"))
import torch
assert not torch.cuda.is_initialized()
engines = {"onnx", "onnxruntime", "openvino", "tensorrt", "torch_tensorrt", "transformers", "torchvision", "timm"}
assert not engines & set(sys.modules), engines & set(sys.modules)
""")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        _ = onecard.optimise

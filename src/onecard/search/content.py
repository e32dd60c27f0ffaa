"""A digest of what a module is made of, in memory: tensors, attributes, classes, and the functions they call.

Only contents count, in a fixed order: no addresses, no folders, no line numbers. Of what is installed the version
counts; of the user's code, which may stand in no file at all (a notebook, a prompt), its bytecode.
"""

from __future__ import annotations

import contextlib
import dis
import enum
import functools
import hashlib
import importlib.metadata
import inspect
import io
import sys
import sysconfig
import types
import zipfile
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_WORDS = (
    *(torch.dtype, torch.layout, torch.memory_format, torch._ops.OpOverload, torch._ops.OpOverloadPacket),
    *(range, slice, type(...), np.generic, np.dtype),
)
"""Kinds whose ``repr`` says all and holds no address."""

_DEEPEST = 100  # levels; Python itself ends at some 1000 calls
_INSTALLED = frozenset(("site-packages", "dist-packages"))


class Content:
    """A SHA-256 that takes in Python values; see the module's docstring."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._seen: dict[int, tuple[int, object]] = {}  # with the objects, so that no address is used twice
        self._depth = 0

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def add(self, *parts: str | bytes) -> None:
        """Take in texts or bytes, each with its length, so that no two sequences look alike."""
        for part in parts:
            data = part.encode(errors="surrogatepass") if isinstance(part, str) else part
            self._hash.update(len(data).to_bytes(8, "little"))
            self._hash.update(data)

    def add_value(self, value: object) -> None:
        """Take in a value of any kind; one of which nothing can be told counts by its type."""
        if self._depth >= _DEEPEST:
            return
        self._depth += 1
        try:
            self._add_value(value)
        finally:
            self._depth -= 1

    def _add_value(self, value: Any) -> None:
        if isinstance(value, enum.Enum):
            self.add(_label(type(value)), value.name)
        elif isinstance(value, _PLAIN + _WORDS):
            self.add(type(value).__name__, repr(value))
        elif isinstance(value, torch.device):
            self.add("device", value.type)
        elif isinstance(value, tuple):  # not counted as seen: equal constants may or may not be one object
            self._add_items(value)
        elif isinstance(value, set | frozenset):
            self.add("set", *sorted(repr(item) if isinstance(item, _PLAIN) else _label(type(item)) for item in value))
        elif self._is_new(value):
            self._add_object(value)

    def _is_new(self, value: object) -> bool:
        if id(value) in self._seen:
            self.add("again", str(self._seen[id(value)][0]))
            return False
        self._seen[id(value)] = (len(self._seen), value)
        return True

    def _add_items(self, items: Iterable[object]) -> None:
        items = list(items)
        self.add("items", str(len(items)))
        if all(type(item) in _PLAIN for item in items):
            self.add(repr(items))
            return
        for item in items:
            self.add_value(item)

    def _add_named(self, values: Mapping[Any, object]) -> None:
        self.add("named", str(len(values)))
        for key in sorted(values, key=lambda k: (type(k).__name__, repr(k) if isinstance(k, _PLAIN) else "")):
            self.add_value(key)
            self.add_value(values[key])

    def _add_object(self, value: Any) -> None:
        """What may be met more than once."""
        if isinstance(value, Tensor):
            self.add("tensor", str(value.dtype), str(tuple(value.shape)), _tensor_bytes(value))
        elif isinstance(value, np.ndarray):
            self.add("array", str(value.dtype), str(value.shape))
            self.add_value(value.tolist() if value.dtype.hasobject else value.tobytes())
        elif isinstance(value, nn.Module):
            self._add_module(value)
        elif isinstance(value, type):
            self._add_class(value)
        elif isinstance(value, types.FunctionType):
            self._add_function(value)
        elif isinstance(value, Mapping):
            self._add_named(value)
        elif (parts := _parts_of(value)) is not None:
            self._add_items(parts)
        else:
            self._add_other(value)

    def _add_other(self, value: Any) -> None:
        """An object of some class: its attributes, if they are the user's, a hook's or a configuration's."""
        kind = type(value)
        if callable(value) and isinstance(getattr(value, "__qualname__", None), str):  # written in C
            self.add(str(getattr(value, "__module__", "")), str(value.__qualname__))
            self.add_value(getattr(value, "__wrapped__", None))  # functools.cache
            return
        users = is_users(kind.__module__)
        self.add_value(kind) if users else self.add(_label(kind))
        is_hook = kind.__module__.startswith("torch.nn.")
        is_settings = hasattr(kind, "__dataclass_fields__") or hasattr(kind, "to_dict") or kind is types.SimpleNamespace
        if (users or is_hook or is_settings) and hasattr(value, "__dict__"):
            self._add_named(vars(value))

    def _add_module(self, module: nn.Module) -> None:
        for kind in type(module).__mro__:
            if kind not in (nn.Module, object):
                self.add_value(kind)
        if isinstance(module, torch.jit.ScriptModule):
            self._add_script(module)
            return
        self._add_named(module._parameters)
        self._add_named(module._buffers)
        if isinstance(module, GraphModule):  # its other attributes are about the tracing
            self.add(module.code)
            self._add_named({name: value for name, value in vars(module).items() if isinstance(value, Tensor)})
        elif type(module).__module__.partition(".")[0] != "onecard":
            own = {name: value for name, value in vars(module).items() if name not in _torchs_attributes()}
            self._add_named(own)
        self._add_items([*module._forward_pre_hooks.values(), *module._forward_hooks.values()])
        for name, child in module._modules.items():  # their order may be that of the calls
            self.add(name)
            self.add_value(child)

    def _add_script(self, module: torch.jit.ScriptModule) -> None:
        """TorchScript as it would be saved, without the places in the source."""
        with zipfile.ZipFile(io.BytesIO(module.save_to_buffer())) as archive:
            for name in sorted(archive.namelist()):
                if not name.endswith(".debug_pkl"):
                    self.add(name.partition("/")[2], archive.read(name))

    def _add_class(self, kind: type) -> None:
        self.add(_label(kind))
        users = is_users(kind.__module__)
        if not users and not _version(kind.__module__):
            with contextlib.suppress(OSError, TypeError):  # written in C, or generated
                self.add(inspect.getsource(kind))
        for name, value in sorted(vars(kind).items()):
            patched = isinstance(value, types.FunctionType) and is_users(value.__module__ or "")
            if patched or (users and (not name.startswith("__") or _has_code(value))):
                self.add(name)
                self.add_value(value)

    def _add_function(self, function: types.FunctionType) -> None:
        cells = function.__closure__ or ()
        if is_users(str(function.__globals__.get("__name__", ""))):  # a decorator's wrapper has its user's __module__
            self._add_items((function.__defaults__, function.__kwdefaults__))
            self._add_code(function.__code__, function.__globals__)
        else:
            self.add(f"{function.__module__}.{function.__qualname__}", _version(function.__module__ or ""))
        for cell in cells:
            with contextlib.suppress(ValueError):  # not filled yet
                self.add_value(cell.cell_contents)

    def _add_code(self, code: types.CodeType, names: Mapping[str, object]) -> None:
        """A function's bytecode, with the values of the globals that it reads."""
        self.add(code.co_code, " ".join(code.co_names), " ".join(code.co_freevars))
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._add_code(constant, names)
            else:
                self.add_value(constant)
        read = {str(step.argval) for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
        for name in sorted(read & set(names)):
            self.add(name)
            self.add_value(names[name])


def _parts_of(value: Any) -> Iterable[object] | None:
    """What a container or a wrapper of something consists of, or None for anything else."""
    parts: Iterable[object] | None = None
    if isinstance(value, list | deque):
        parts = value
    elif isinstance(value, types.MethodType):
        parts = (value.__func__, value.__self__)
    elif isinstance(value, functools.partial):
        parts = (value.func, value.args, value.keywords)
    elif isinstance(value, property):
        parts = (value.fget, value.fset)
    elif isinstance(value, staticmethod | classmethod):
        parts = (value.__func__,)
    elif isinstance(value, torch.jit.ScriptFunction):
        parts = (value.code,)
    elif isinstance(value, types.ModuleType):
        parts = ("module", value.__name__.rpartition(".")[2])
    return parts


def is_users(module: str) -> bool:
    """Whether a Python module is the user's own: not of the standard library, not installed, not onecard's."""
    top = module.partition(".")[0]
    if top in ("", "torch", "onecard", "builtins"):  # torch keeps what it generates under its own name
        return False
    for name in (module, top):
        file = getattr(sys.modules.get(name), "__file__", None)
        if isinstance(file, str):
            return not _is_installed(file)
    return top not in sys.stdlib_module_names


@functools.cache
def _is_installed(file: str) -> bool:
    path = Path(file)
    if not _INSTALLED.isdisjoint(path.parts):
        return True
    library = {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")}
    library |= {folder.resolve() for folder in library}
    return not library.isdisjoint((*path.parents, *path.resolve().parents))


@functools.cache
def _version(module: str) -> str:
    """The version of the package that a module belongs to, where it is cheap to know."""
    top = module.partition(".")[0]
    found = getattr(sys.modules.get(top), "__version__", None)
    if isinstance(found, str):
        return found
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError):
        return importlib.metadata.version(top)
    return ""


@functools.cache
def _torchs_attributes() -> frozenset[str]:
    return frozenset(vars(nn.Module()))


def _label(kind: type) -> str:
    """A class's name, with its module only where that is no matter of the folder it was loaded from."""
    if is_users(kind.__module__):
        return kind.__qualname__
    return f"{kind.__module__}.{kind.__qualname__} {_version(kind.__module__)}"


def _has_code(value: object) -> bool:
    return isinstance(value, types.FunctionType | staticmethod | classmethod | property)


def _tensor_bytes(tensor: Tensor) -> bytes:
    try:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        return hashlib.sha256(flat.view(torch.uint8).numpy().data).digest() if flat.numel() else b""
    except (RuntimeError, TypeError, NotImplementedError):  # sparse, quantised, or of a class of its own
        buffer = io.BytesIO()
        with contextlib.suppress(Exception):  # without any content, as on the device "meta"
            torch.save(tensor.detach().cpu(), buffer)
        return hashlib.sha256(buffer.getvalue()).digest()

"""Weights streamed from main memory, for models larger than the card: operators run as they are, nothing is compiled.

The artifact is the exported program without its weights, a safetensors file of weights for each part, and how the
program was cut. What stays on the device is planned when it is loaded, for the memory limit of that moment.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import fx, nn
from torch.export import ExportedProgram

from onecard.backends.base import Runner, Target, Tensors
from onecard.backends.export import dynamic_symbols
from onecard.errors import BundleError, DeviceMemoryError, Unsupported
from onecard.evidence import Verdict
from onecard.models.exported import load_exported, save_exported
from onecard.models.flat import FlatModule
from onecard.streaming.capture import capture
from onecard.streaming.link import make_link
from onecard.streaming.model import StreamOptions, default_part_bytes, make_budget
from onecard.streaming.residency import plan_residency
from onecard.streaming.runner import StreamRunner
from onecard.streaming.split import Split, split_program
from onecard.streaming.store import ModuleSource, PartFiles, require_main_memory, write_parts

_PROGRAM = "program.pt2"
_PARTS = "parts"
_SPLIT = "split.json"
_CURE = "Say what the model may take: --device-memory 4GiB."


class _PartNote(msgspec.Struct, frozen=True):
    """One part, for people and for checking: its layers, and the bytes of its weights."""

    name: str
    first: str
    last: str
    bytes: int


class _Note(msgspec.Struct, frozen=True):
    """How the program was cut (operators before the end of each part), and the limit that it was cut for."""

    device_memory: int
    cuts: tuple[int, ...]
    parts: tuple[_PartNote, ...]


class StreamBackend:
    """Runs under a limit of device memory, the target's.

    The module may be given on the CPU when it is built for a card: it is traced as if it were there.
    """

    builds_on_host = True  # the module may be larger than the device's memory

    def available(self, target: Target) -> Verdict | None:
        if target.device_memory is None:
            return Verdict("unavailable", "no limit of device memory is given, so there is nothing to stream", _CURE)
        return None

    def build(self, module: FlatModule, inputs: Tensors, folder: Path, target: Target) -> None:
        limit = target.device_memory
        if limit is None:
            raise Unsupported("no limit of device memory is given", _CURE)
        if target.bucket is not None and dynamic_symbols(target.spec):
            raise Unsupported("each bucket would hold weights of its own", "Use the recipe without @bucket.")
        program = capture(module, target.spec, target.device).program
        _hollow(program)
        save_exported(program, folder / _PROGRAM)
        # Cut what will be loaded, not what was in memory: the operators must be counted alike.
        split = split_program(load_exported(folder / _PROGRAM), default_part_bytes(limit))
        try:
            plan_residency(split.sizes, make_budget(split, limit, target.device, StreamOptions()))
        except DeviceMemoryError as error:
            raise Unsupported(error.message, error.cure) from error
        write_parts(folder / _PARTS, split, ModuleSource(module.inner, None, consume=False))
        (folder / _SPLIT).write_bytes(msgspec.json.encode(_note(split, limit)))

    def load(self, folder: Path, target: Target) -> Runner:
        try:
            note = msgspec.json.decode((folder / _SPLIT).read_bytes(), type=_Note)
        except msgspec.MsgspecError as error:
            raise BundleError(f"{_SPLIT} cannot be read: {error}.", "Copy the bundle again.") from error
        limit = target.device_memory or note.device_memory
        program = load_exported(folder / _PROGRAM)
        _place(program.graph_module, target.device)
        split = split_program(program, default_part_bytes(limit), note.cuts)
        budget = make_budget(split, limit, target.device, StreamOptions())
        residency = plan_residency(split.sizes, budget)
        copied = (split.weights[n] for i in residency.streamed for n in split.parts[i].weights)
        require_main_memory(sum(weight.nbytes for weight in copied if weight.name not in residency.kept))
        link = make_link(target.device, limit - budget.activation_bytes)
        runner = StreamRunner(split, residency, PartFiles(folder / _PARTS), link)
        return StreamVariant(runner, target)


class StreamVariant:
    """A streamed program behind the spec's names."""

    def __init__(self, runner: StreamRunner, target: Target) -> None:
        self._runner = runner
        self._inputs = tuple(t.name for t in target.spec.inputs)
        self._outputs = tuple(t.name for t in target.spec.outputs)

    def __call__(self, inputs: Tensors) -> Tensors:
        answers = self._runner([inputs[name] for name in self._inputs])
        return dict(zip(self._outputs, answers, strict=True))

    def close(self) -> None:
        self._runner.close()


def _hollow(program: ExportedProgram) -> None:
    """Put one zero, repeated, in the place of each weight of a captured program, so that it is saved without them.

    Tensors that the program made for itself stay: they are few and small, and the parts take them as they are.
    """
    signature = program.graph_signature
    names = {*signature.inputs_to_parameters.values(), *signature.inputs_to_buffers.values()}
    held: tuple[dict[str, Any], ...] = (program.state_dict, program.constants)
    for tensors in held:
        for name in names & set(tensors):
            old = tensors[name]
            zeros = torch.zeros((1,) * old.dim(), dtype=old.dtype).expand(old.shape)
            tensors[name] = nn.Parameter(zeros, old.requires_grad) if isinstance(old, nn.Parameter) else zeros


def _note(split: Split, limit: int) -> _Note:
    sizes = (sum(part.values()) for part in split.sizes)
    parts = (_PartNote(p.name, p.first, p.last, size) for p, size in zip(split.parts, sizes, strict=True))
    return _Note(limit, split.cuts, tuple(parts))


def _place(module: fx.GraphModule, device: str) -> None:
    """Let the tensors that a program makes for itself be made on another card than it was exported on."""
    wanted = torch.device(device)

    def moved(value: Any) -> Any:
        return wanted if isinstance(value, torch.device) and value.type == wanted.type else value

    def walk(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: walk(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(walk(item) for item in value)
        return moved(value)

    for graph_module in module.modules():
        if isinstance(graph_module, fx.GraphModule):
            for node in graph_module.graph.nodes:
                node.args, node.kwargs = tuple(map(walk, node.args)), walk(dict(node.kwargs))
            graph_module.recompile()

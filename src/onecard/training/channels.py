"""Channels that can be removed together, found in the model's dependency graph, and their removal for good.

The graph is torch-pruning's (Fang et al. 2023, DepGraph, https://arxiv.org/abs/2301.12900). What it says is not
taken on trust: a group is used only if removing channels gives what the whole model gives without their contribution.
"""

from __future__ import annotations

import copy
import fnmatch
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onecard.errors import MissingDependencyError, ModelError
from onecard.models.flat import FlatModule
from onecard.models.wording import first_line
from onecard.training.attention import Attention, find_attentions

Inputs = tuple[Tensor, ...]
Removal = dict[str, tuple[int, ...]]
"""The layer that leads a group, and those of its output channels that go."""

LEAST_SHARE = 0.1
"""Of a layer's channels as many stay at least, lest a layer collapses (Tanaka et al. 2020, section 3)."""

_TOLERANCE = 1e-3  # fp32 rounding through a deep network; a wrong channel is off by orders of magnitude more
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (*_CONVS, nn.Linear)
_MIXING = (nn.LayerNorm, nn.GroupNorm, nn.MultiheadAttention, nn.LSTM, nn.GRU)  # the rest of the channels shows in each


@dataclass(frozen=True)
class ChannelGroup:
    """Channels of several layers that can only go together, like those on both sides of a residual sum.

    Args:
        root: the layer whose output channels number the group's.
        channels: how many there are.
        units: the smallest sets of channels that can go: single ones, one of each convolution group, whole heads.
        block: units that go at once, so that what is left is a multiple of what the user asked for.
        least: units that stay.
    """

    root: str
    channels: int
    units: tuple[tuple[int, ...], ...]
    block: int
    least: int

    @property
    def block_sizes(self) -> list[int]:
        """Units of each block that can go, one after the other; the first one makes the rest even."""
        left = len(self.units)
        sizes: list[int] = []
        while True:
            size = left % self.block or self.block
            if left - size < max(self.block, self.least):
                return sizes
            sizes.append(size)
            left -= size


@dataclass(frozen=True)
class Choice:
    """What of a model can be pruned, and why the rest cannot."""

    groups: tuple[ChannelGroup, ...]
    kept: dict[str, str]


@dataclass(frozen=True)
class Limits:
    """What the user asked to keep.

    Args:
        round_to: channels are left in multiples of it.
        keep: globs of layer names.
        least: by leading layer, the channels that must stay; a tenth where it says nothing.
    """

    round_to: int = 8
    keep: tuple[str, ...] = ()
    least: Mapping[str, int] | None = None


def find_groups(module: FlatModule, probes: Sequence[Inputs], limits: Limits) -> Choice:
    """The groups of channels that can be removed from a model.

    Args:
        module: in evaluation mode; left as it is.
        probes: inputs of several sizes, on the module's device.
        limits: what to keep.

    Raises:
        MissingDependencyError: torch-pruning is not installed.
        ModelError: the model cannot be traced, or nothing of it can be pruned.
    """
    if not any(isinstance(layer, _LAYERS) for layer in module.modules()):
        raise _nothing_to_prune(module, {})
    module = trainable_copy(module)
    graph = _Graph.of(module, probes[0])
    groups, kept = [], {}
    for found in graph.groups():
        answer = graph.describe(found, limits)
        root = graph.name(found[0].dep.target.module)
        if isinstance(answer, ChannelGroup):
            groups.append(answer)
        else:
            kept[root] = answer
    if groups and (reason := check(module, probes, groups)):
        sound = []
        for group in groups:
            reason = check(module, probes, [group])
            if reason:
                kept[group.root] = reason
            else:
                sound.append(group)
        groups = sound
    if not groups:
        raise _nothing_to_prune(module, kept)
    return Choice(tuple(groups), kept)


def check(module: FlatModule, probes: Sequence[Inputs], groups: Sequence[ChannelGroup]) -> str:
    """Try to remove the first block of each group, and compare with the whole model.

    A channel that is gone must have the same effect as one whose weights are zero in every layer that reads it.

    Returns:
        Why these groups cannot be pruned, or nothing.
    """
    trial = copy.deepcopy(module)
    removal = {g.root: tuple(i for unit in g.units[: g.block_sizes[0]] for i in unit) for g in groups}
    try:
        graph = _Graph.of(trial, probes[0])
        exact = all([graph.mask(graph.group(root, channels)) for root, channels in removal.items()])
        with torch.no_grad():
            wanted = [trial(*inputs) for inputs in probes]
            graph.remove(removal)
            found = [trial(*inputs) for inputs in probes]
    except Exception as error:  # a model's own code, run with sizes that its author did not foresee
        return f"the model does not run without some of its channels: {first_line(error)}"
    for before, after in zip(wanted, found, strict=True):
        if [t.shape for t in before] != [t.shape for t in after]:
            return "its channels are part of the model's output"
        if exact and not all(_near(a, b) for a, b in zip(before, after, strict=True)):
            return "its channels are mixed in a way that the dependency graph does not show"
    return ""


def remove(module: FlatModule, inputs: Inputs, removal: Removal) -> None:
    """Remove channels from a module in place.

    Args:
        module: in evaluation mode, with parameters that require gradients (:func:`trainable_copy`).
        inputs: an example for tracing, on the module's device.
        removal: channels by the name of the leading layer.
    """
    if removal:
        _Graph.of(module, inputs).remove(removal)


def full_group(module: FlatModule, inputs: Inputs, roots: Sequence[str]) -> Iterator[Any]:
    """torch-pruning's own groups with all their channels, for its estimates of importance."""
    graph = _Graph.of(module, inputs)
    for root in roots:
        layer = module.get_submodule(root)
        yield graph.group(root, range(graph.dependency.get_out_channels(layer)))


def trainable_copy(module: FlatModule) -> FlatModule:
    """A copy in evaluation mode whose floating-point parameters require gradients.

    Raises:
        ModelError: the module cannot be copied.
    """
    try:
        copied = copy.deepcopy(module)
    except Exception as error:  # any attribute of the user's module may refuse to be copied
        raise ModelError(f"the model cannot be copied: {first_line(error)}.") from error
    for parameter in copied.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return copied.eval()


def channels_of(module: nn.Module) -> dict[str, tuple[int, int]]:
    """By layer name, the input and output channels of every convolution and linear layer."""
    found = {}
    for name, layer in module.named_modules():
        if isinstance(layer, _CONVS):
            found[display_name(name)] = (layer.in_channels, layer.out_channels)
        elif isinstance(layer, nn.Linear):
            found[display_name(name)] = (layer.in_features, layer.out_features)
    return found


def display_name(name: str) -> str:
    """A layer's name as the user's model has it, without the flat module around it."""
    return name.removeprefix("inner.")


class _Graph:
    """torch-pruning's dependency graph of one module, in this module's words."""

    def __init__(self, module: FlatModule, dependency: Any, outputs: list[Any]) -> None:
        self.module, self.dependency, self._outputs = module, dependency, outputs
        self._names = {layer: name for name, layer in module.named_modules()}
        self._attentions = find_attentions(module)

    @staticmethod
    def of(module: FlatModule, inputs: Inputs) -> _Graph:
        tp = _torch_pruning()
        outputs: list[Any] = []

        def floating(answer: tuple[Tensor, ...]) -> list[Tensor]:
            kept = [t for t in answer if t.grad_fn is not None]
            outputs.extend(t.grad_fn for t in kept)
            return kept

        run: Callable[[nn.Module, Inputs], Any] = lambda traced, tensors: traced(*tensors)  # noqa: E731
        try:
            with _quiet(), torch.enable_grad():
                dependency = tp.DependencyGraph().build_dependency(
                    module, inputs, forward_fn=run, output_transform=floating, verbose=False
                )
        except Exception as error:  # the model's own code runs here, and a graph that nobody foresaw
            raise ModelError(
                f"torch-pruning cannot trace this model: {first_line(error)}.",
                "Its forward must be differentiable and made of torch layers.",
            ) from error
        if not outputs:
            raise ModelError("no output of the model can be differentiated, so its channels cannot be traced.")
        return _Graph(module, dependency, outputs)

    def name(self, layer: nn.Module) -> str:
        return str(self._names.get(layer, ""))

    def groups(self) -> list[Any]:
        return list(self.dependency.get_all_groups(root_module_types=_LAYERS))

    def group(self, root: str, channels: Sequence[int]) -> Any:
        layer = self.module.get_submodule(root)
        handler = self.dependency.get_pruner_of_module(layer).prune_out_channels
        return self.dependency.get_pruning_group(layer, handler, list(channels))

    def describe(self, group: Any, limits: Limits) -> ChannelGroup | str:
        """The group as units and blocks, or why it has to stay."""
        layers = [dep.target for dep, _ in group if self._loses_output(dep)]
        named = [name for node in layers if (name := self.name(node.module))]
        root = group[0].dep.target.module
        if any(node.grad_fn in self._outputs or "OutputOp" in type(node.module).__name__ for node in layers):
            return "it makes an output of the model"
        for name in named:
            if any(fnmatch.fnmatchcase(display_name(name), glob) for glob in limits.keep):
                return f"{display_name(name)} is to be kept"
        channels = int(self.dependency.get_out_channels(root))
        units = self._units(group, self.name(root), channels)
        if isinstance(units, str):
            return units
        size = len(units[0])
        least = (limits.least or {}).get(self.name(root), math.ceil(channels * LEAST_SHARE))
        block = limits.round_to // math.gcd(limits.round_to, size)
        found = ChannelGroup(self.name(root), channels, units, block, -(-least // size))
        few = f"it has only {channels} channels"
        return found if found.block_sizes else few

    def _units(self, group: Any, root: str, channels: int) -> tuple[tuple[int, ...], ...] | str:
        modules = {dep.target.module for dep, _ in group if self._loses_output(dep)}
        heads = [a for a in self._attentions if modules & a.projections]
        if heads:
            return _head_units(heads, modules, self.module.get_submodule(root), channels)
        sections = {self._sections(dep) for dep, _ in group}
        merged = next(iter(self.group(root, [0]))).idxs  # channels that go with channel 0, where a chunk couples them
        step = channels // len(merged)
        if sorted(merged) != list(range(0, channels, step))[: len(merged)] or channels % len(merged):
            return "its channels are coupled irregularly"
        sections.add(len(merged))
        count = max(sections)
        if any(count % s for s in sections) or channels % count:
            return f"its channels are split into {' and '.join(map(str, sorted(sections - {1})))} groups at once"
        width = channels // count
        return tuple(tuple(range(i, channels, width)) for i in range(width))

    def _sections(self, dep: Any) -> int:
        """Into how many equal parts a layer splits these channels."""
        layer = dep.target.module
        if isinstance(layer, nn.MultiheadAttention):
            return int(layer.num_heads)
        if isinstance(layer, nn.GroupNorm):
            return int(layer.num_groups)
        if isinstance(layer, _CONVS) and layer.groups != layer.out_channels:
            return int(layer.groups)
        return 1

    def _loses_output(self, dep: Any) -> bool:
        return bool(self.dependency.is_out_channel_pruning_fn(dep.handler))

    def mask(self, group: Any) -> bool:
        """Let no layer read a group's channels; False where that does not undo all that they do."""
        exact = True
        for dep, channels in group:
            layer = dep.target.module
            if isinstance(layer, _MIXING):
                exact = False
            elif isinstance(layer, _LAYERS) and not self._loses_output(dep):
                _mask_inputs(layer, channels)
        return exact

    def remove(self, removal: Removal) -> None:
        with _quiet():
            for root, channels in removal.items():
                group = self.group(root, channels)
                if not self.dependency.check_pruning_group(group):
                    raise ModelError(f"removing {len(channels)} channels leaves a layer behind {root} without any.")
                group.prune()
        for attention in self._attentions:
            attention.count_heads()


def _head_units(
    heads: list[Attention], modules: set[nn.Module], root: nn.Module, channels: int
) -> tuple[tuple[int, ...], ...] | str:
    """Whole attention heads as units, since an attention's heads must all have one size."""
    if len(heads) > 1 or not heads[0].projections <= modules or root not in heads[0].projections:
        return "its attention heads are coupled with those of another layer"
    size = heads[0].head_size
    return tuple(tuple(range(low, low + size)) for low in range(0, channels, size))


@torch.no_grad()
def _mask_inputs(layer: Any, channels: Sequence[int]) -> None:
    if isinstance(layer, nn.Linear):
        layer.weight[:, list(channels)] = 0
    elif layer.transposed:
        layer.weight[list(channels)] = 0  # [in, out / groups, ...]
    else:
        per_group, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
        for channel in channels:  # weight [out, in / groups, ...]
            part = channel // per_group
            layer.weight[part * outputs : (part + 1) * outputs, channel % per_group] = 0


def _near(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return True  # what is decided by a threshold may flip
    return float((a - b).double().norm()) <= _TOLERANCE * max(float(a.double().norm()), 1e-30)


def _nothing_to_prune(module: FlatModule, kept: Mapping[str, str]) -> ModelError:
    reasons = "; ".join(f"{display_name(name)}: {reason}" for name, reason in list(kept.items())[:3])
    if kept:
        return ModelError(f"no layer of the model can be pruned ({reasons}).", "Try a smaller --round-to.")
    return ModelError(
        f"{type(module.inner).__name__} has no convolution or linear layer whose channels could be removed.",
        "Give the model's own Python code (file.py:callable) rather than an exported, scripted or ONNX file.",
    )


def _torch_pruning() -> Any:
    try:
        with _quiet():
            import torch_pruning
    except ImportError as error:
        raise MissingDependencyError(
            "pruning needs torch-pruning, which is not installed.", "pip install 'onecard[pruning]'"
        ) from error
    return torch_pruning


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

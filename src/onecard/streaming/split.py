"""A captured graph cut in order into parts of about equal weight bytes, and what goes in and out of each.

The cutting is ``torch.fx``'s ``split_module``, which the splitter of ``torch.distributed.pipelining`` stands on. Parts
run strictly in order. A part takes its weights as arguments, like its inputs, so where they lie is the runner's affair.
"""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from onecard.errors import Unsupported
from onecard.streaming.activations import peak_activation_bytes, written_weights
from onecard.streaming.residency import aligned

WEIGHT, CONSTANT, VALUE = "weight", "constant", "value"
_WRAPPER = "inner."  # where a flat module holds the original


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer: its elements are dense, in the order that the strides tell.

    Args:
        name: as in the module.
        shape: sizes.
        stride: in elements.
        dtype: of the elements.
        requires_grad: as in the module: ``matmul`` chooses its kernel by it, even where no gradient is taken.
    """

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool = False

    @property
    def nbytes(self) -> int:
        """Of the elements."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Ref(NamedTuple):
    """A tensor by what it is (weight, constant, or a value: an input or an activation) and its name."""

    kind: str
    name: str


@dataclass(frozen=True)
class Part:
    """Operators that run together.

    Args:
        name: ``part-000`` ...
        module: takes ``takes`` by position.
        takes: weights, constants and values.
        gives: the values that later parts, or the caller, need.
        is_tuple: whether the module gives a tuple of them, rather than the only one.
        weights: names of the weights it uses, each once, in the order of first use.
        first: the layer of its first weight.
        last: the layer of its last weight.
    """

    name: str
    module: fx.GraphModule
    takes: tuple[Ref, ...]
    gives: tuple[str, ...]
    is_tuple: bool
    weights: tuple[str, ...]
    first: str
    last: str


@dataclass(frozen=True)
class Split:
    """A program in parts.

    Args:
        parts: in the order in which they run.
        weights: all that any part uses, by name.
        constants: small tensors of the program itself, where the program has them.
        inputs: names of the values that the caller gives, in order.
        outputs: what the caller gets, in order.
        dies: for each part the values that no later part needs.
        cuts: how many operators stand before the end of each part; the same cuts give the same split.
        activation_bytes: the most that inputs, activations and outputs take at once.
    """

    parts: tuple[Part, ...]
    weights: Mapping[str, Weight]
    constants: Mapping[str, Tensor]
    inputs: tuple[str, ...]
    outputs: tuple[Ref, ...]
    dies: tuple[tuple[str, ...], ...]
    cuts: tuple[int, ...]
    activation_bytes: int

    @property
    def sizes(self) -> list[dict[str, int]]:
        """Each part's weights and their bytes, for :func:`onecard.streaming.residency.plan_residency`."""
        return [{name: self.weights[name].nbytes for name in part.weights} for part in self.parts]


def split_program(program: ExportedProgram, part_bytes: int, cuts: Sequence[int] | None = None) -> Split:
    """Cut a program into parts.

    Args:
        program: its weights' values are not looked at; they may be fakes.
        part_bytes: about the most weight bytes of a part; one layer that is larger is a part of its own.
        cuts: of an earlier split of the same program, to get the same one.

    Raises:
        Unsupported: the program changes its weights or inputs while it runs, or takes what is no tensor.
    """
    graph = program.graph_module.graph
    roles = _roles(program)
    weights = {
        node.name: _weight(program, roles[node.name].name, node) for node in graph.nodes if _is_weight(node, roles)
    }
    fixed = frozenset(n for n in graph.nodes if n.name in roles and roles[n.name].kind != VALUE)
    written = written_weights(graph, fixed)
    if written:
        raise Unsupported(f"the model changes its own weights or buffers while it runs ({written[0]})")
    steps = [n for n in graph.nodes if n.op.startswith("call_")]
    uses = [_uses(node, weights) for node in steps]
    if cuts is None:
        cuts = _cuts(uses, part_bytes)
    if not cuts or list(cuts) != sorted(cuts) or cuts[-1] != len(steps):
        raise Unsupported(f"the program of {len(steps)} operators cannot be cut at {list(cuts)}")
    part_of = {node: bisect_right(cuts, index) for index, node in enumerate(steps)}
    whole = _split_module(program.graph_module, part_of)
    walk = _Walk(roles)
    parts = tuple(walk.parts(whole))
    used = {name for part in parts for name in part.weights}
    return Split(
        parts=parts,
        weights={w.name: w for w in weights.values() if w.name in used},
        constants=_constants(program),
        inputs=tuple(str(name) for name in program.graph_signature.user_inputs),
        outputs=walk.outputs,
        dies=_dies(parts, walk.outputs),
        cuts=tuple(cuts),
        activation_bytes=peak_activation_bytes(graph, part_of, fixed, program.range_constraints),
    )


def shown_name(name: str) -> str:
    """A weight's name as the original module has it, which stands within a flat module."""
    return name.removeprefix(_WRAPPER)


def dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """A tensor's strides if its elements fill one block of memory in some order, else those of a contiguous copy."""
    expected = 1
    pairs = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    for stride, size in pairs:
        if size != 1 and stride != expected:
            return tuple(torch.empty(tensor.shape, device="meta").stride())
        expected *= max(size, 1)
    return tuple(tensor.stride())


def _roles(program: ExportedProgram) -> dict[str, Ref]:
    """What each placeholder is."""
    signature = program.graph_signature
    changed = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if changed:
        raise Unsupported(f"the model changes '{changed[0]}' while it runs")
    kinds = {InputKind.PARAMETER: WEIGHT, InputKind.BUFFER: WEIGHT, InputKind.CONSTANT_TENSOR: CONSTANT}
    roles: dict[str, Ref] = {}
    for spec in signature.input_specs:
        name = getattr(spec.arg, "name", "")
        if spec.kind in kinds:
            target = str(spec.target)
            roles[name] = Ref(kinds[spec.kind], shown_name(target) if kinds[spec.kind] == WEIGHT else target)
        elif spec.kind == InputKind.USER_INPUT and name:
            roles[name] = Ref(VALUE, name)
        else:
            raise Unsupported(f"the model takes '{spec.arg}', which is no tensor")
    return roles


def _is_weight(node: fx.Node, roles: Mapping[str, Ref]) -> bool:
    return node.op == "placeholder" and roles[node.name].kind == WEIGHT


def _weight(program: ExportedProgram, name: str, node: fx.Node) -> Weight:
    value = node.meta["val"]
    held = program.state_dict.get(program.graph_signature.inputs_to_parameters.get(node.name, ""))
    return Weight(name, tuple(value.shape), dense_stride(value), value.dtype, held is not None and held.requires_grad)


def _constants(program: ExportedProgram) -> dict[str, Tensor]:
    names = program.graph_signature.inputs_to_lifted_tensor_constants.values()
    found = {name: program.constants[name] for name in names}
    for name, tensor in found.items():
        if type(tensor) is not Tensor:
            raise Unsupported(f"the constant '{name}' is a {type(tensor).__name__}, not a plain tensor")
    return found


def _uses(node: fx.Node, weights: Mapping[str, Weight]) -> dict[str, int]:
    """The weights that an operator uses, and their bytes."""
    found = [weights[source.name] for source in node.all_input_nodes if source.name in weights]
    return {weight.name: aligned(weight.nbytes) for weight in found}


def _cuts(uses: Sequence[Mapping[str, int]], part_bytes: int) -> list[int]:
    """Cuts with as few parts as the size allows, and with that many, parts as equal as can be.

    What several parts use counts in each: it may have to be copied with each.
    """
    low, high = 1, max(1, part_bytes)
    count = len(_greedy(uses, high))
    while low < high:
        middle = (low + high) // 2
        if len(_greedy(uses, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    return _greedy(uses, high)


def _greedy(uses: Sequence[Mapping[str, int]], limit: int) -> list[int]:
    """Ends of parts that are filled in turn up to a limit; an operator that needs more stands alone."""
    cuts: list[int] = []
    held: dict[str, int] = {}
    total = 0
    for index, use in enumerate(uses):
        more = sum(size for name, size in use.items() if name not in held)
        if more and held and total + more > limit:
            cuts.append(index)
            held, total = {}, 0
            more = sum(use.values())
        held.update(use)
        total += more
    return [*cuts, len(uses)]


def _split_module(module: fx.GraphModule, part_of: Mapping[fx.Node, int]) -> fx.GraphModule:
    from torch.fx.passes.split_module import split_module

    # Steps that only later parts depend on must not be moved: parts run in the order of the graph.
    return split_module(module, module, lambda node: part_of[node], keep_original_order=True)


class _Walk:
    """The split module's own graph, read as a list of parts with named values between them."""

    def __init__(self, roles: Mapping[str, Ref]) -> None:
        self._roles = roles
        self.outputs: tuple[Ref, ...] = ()

    def parts(self, whole: fx.GraphModule) -> Iterator[Part]:
        env: dict[fx.Node, Ref] = {}
        gives: dict[fx.Node, tuple[str, ...]] = {}
        for node in whole.graph.nodes:
            if node.op == "placeholder":
                env[node] = self._roles[str(node.target)]
            elif node.op == "call_module":
                part = self._part(whole, node, env, len(gives))
                gives[node] = part.gives
                if not part.is_tuple:
                    env[node] = Ref(VALUE, part.gives[0])
                yield part
            elif node.op == "call_function" and node.target is operator.getitem:
                source: Any = node.args[0]
                index: Any = node.args[1]
                env[node] = Ref(VALUE, gives[source][index])
            elif node.op == "output":
                self.outputs = _output_refs(node, env)

    def _part(self, whole: fx.GraphModule, call: fx.Node, env: Mapping[fx.Node, Ref], index: int) -> Part:
        module = whole.get_submodule(str(call.target))
        assert isinstance(module, fx.GraphModule)
        takes = tuple(env[source] for source in call.args if isinstance(source, fx.Node))
        if len(takes) != len(call.args):
            raise Unsupported("a part of the model takes what is no tensor")
        answer = next(n for n in module.graph.nodes if n.op == "output").args[0]
        is_tuple = isinstance(answer, tuple | list)
        given: Any = answer if is_tuple else (answer,)
        names = tuple(f"{index}.{n.name}" for n in given)
        weights = tuple(dict.fromkeys(ref.name for ref in takes if ref.kind == WEIGHT))
        layers = [name.rpartition(".")[0] or name for name in weights]
        ends = (layers[0], layers[-1]) if layers else ("", "")
        return Part(f"part-{index:03d}", module, takes, names, is_tuple, weights, *ends)


def _output_refs(node: fx.Node, env: Mapping[fx.Node, Ref]) -> tuple[Ref, ...]:
    answers: Any = node.args[0]
    leaves = answers if isinstance(answers, tuple | list) else (answers,)
    if not all(isinstance(leaf, fx.Node) for leaf in leaves):
        raise Unsupported("the model gives an answer that is no tensor")
    refs = tuple(env[leaf] for leaf in leaves)
    if any(ref.kind == WEIGHT for ref in refs):
        raise Unsupported("the model gives one of its weights as an answer")
    return refs


def _dies(parts: Sequence[Part], outputs: Sequence[Ref]) -> tuple[tuple[str, ...], ...]:
    """For each part the values whose last use it is."""
    last: dict[str, int] = {}
    for index, part in enumerate(parts):
        last.update(dict.fromkeys(part.gives, index))
        last.update({ref.name: index for ref in part.takes if ref.kind == VALUE})
    kept = {ref.name for ref in outputs}
    return tuple(tuple(n for n, at in last.items() if at == i and n not in kept) for i in range(len(parts)))

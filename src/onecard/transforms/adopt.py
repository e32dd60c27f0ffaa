"""A program in the original's place: what pruning or quantisation-aware training made of the same model."""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from torch import fx

from onecard.calibration.bench import Bench, Run
from onecard.calibration.settle import settle
from onecard.errors import Unsupported
from onecard.models.exported import flat_program, load_exported
from onecard.models.flat import FlatModule, by_name, positional

_LAYERS = (torch.nn.modules.conv._ConvNd, torch.nn.Linear)


def pruned(module: FlatModule, bench: Bench) -> FlatModule:
    """Take the program that ``--pruned`` names.

    Raises:
        Unsupported: there is none.
    """
    return _adopt(module, bench, "pruned", "prune")


def qat(module: FlatModule, bench: Bench) -> FlatModule:
    """Take the program that ``--qat`` names: it quantises and dequantises between its layers.

    Raises:
        Unsupported: there is none.
    """
    return _adopt(module, bench, "qat", "qat")


def _adopt(module: FlatModule, bench: Bench, name: str, maker: str) -> FlatModule:
    path = bench.alternatives / f"{name}.pt2" if bench.alternatives else None
    if path is None or not path.is_file():
        raise Unsupported(
            f"no program was given for '{name}'", f"Make one with 'onecard {maker}' and pass it with --{name} FILE.pt2."
        )
    inner = flat_program(load_exported(path)).to(bench.device)
    plan = positional(module.plan.inputs)
    adopted = FlatModule(inner, type(plan)(plan.inputs, plan.args, {}, module.plan.outputs)).eval()

    def make(method: str, kept: tuple[str, ...]) -> Run:
        return partial(by_name, adopted, bench.spec)

    # Nothing is calibrated here: the rows only judge.
    settle(name, _layers(inner), ("",), make, dataclasses.replace(bench, calibration=None))
    return adopted


def _layers(inner: torch.nn.Module) -> tuple[str, ...]:
    """The layers of the program: modules, or operators where their weights are quantised."""
    names = [n for n, m in inner.named_modules() if isinstance(m, _LAYERS)]
    if isinstance(inner, fx.GraphModule):
        calls = (n for n in inner.graph.nodes if n.op == "call_function")
        names += [n.name for n in calls if str(n.target).startswith(("aten.conv", "aten.linear"))]
    return tuple(names)

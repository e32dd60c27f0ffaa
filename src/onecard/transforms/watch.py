"""Rewriting modules by watching one run: what goes into and comes out of which, and whether the answers stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from onecard.errors import Unsupported
from onecard.models.flat import FlatModule
from onecard.models.wording import first_line
from onecard.transforms.precision import precision_scope

_TOLERANCE = 1e-3  # fp32 rounding through a deep network; a wrong rewriting is off by orders of magnitude more


@contextmanager
def exact_run() -> Iterator[None]:
    """IEEE fp32 without gradients, where tensors count their changes in place (inference tensors do not)."""
    with torch.inference_mode(False), torch.no_grad(), precision_scope("fp32"):
        yield


def run(module: FlatModule, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The flat module's answers to named inputs; to be called inside :func:`exact_run`.

    The module gets copies that are no inference tensors, and may change them in place: the next run, and the caller,
    have the inputs as they were.
    """
    answers: tuple[Tensor, ...] = module(*(inputs[name].clone() for name in module.plan.inputs))
    return answers


def watch(module: FlatModule, inputs: Mapping[str, Tensor], hooks: Callable[[ExitStack], None]) -> None:
    """Run a module once with hooks that are gone afterwards.

    Args:
        module: what is run.
        inputs: its inputs by name.
        hooks: registers hooks and hands each one's removal to the stack.
    """
    with ExitStack() as stack:
        hooks(stack)
        run(module, inputs)


def rewrite(module: FlatModule, inputs: Mapping[str, Tensor], change: Callable[[], None], what: str) -> FlatModule:
    """Change a module and see that its answers stay.

    Args:
        module: in evaluation mode; ``change`` changes it.
        inputs: the example to compare on.
        change: does the rewriting.
        what: its name for the error, as in ``fusing query, key and value``.

    Returns:
        The module.

    Raises:
        Unsupported: the changed module fails or answers otherwise (relative L2 above 1e-3 in any output).
    """
    before = [t.double() for t in run(module, inputs)]
    change()
    try:
        after = run(module, inputs)
    except Exception as error:  # the model's own code runs here, on views and types it may not expect
        raise Unsupported(f"after {what} the model fails: {type(error).__name__}: {first_line(error)}") from error
    for old, new in zip(before, after, strict=True):
        moved = relative_l2(new, old)
        if not moved <= _TOLERANCE:
            raise Unsupported(f"{what} changes the answers by {moved:.1e}: a tensor is also used somewhere unseen")
    return module


def replace(module: nn.Module, made: Mapping[nn.Module, nn.Module]) -> None:
    """Put new modules in the place of old ones, in place; one may have several names."""
    for name, child in list(module.named_modules(remove_duplicate=False)):
        if child in made:
            module.set_submodule(name, made[child])


def relative_l2(out: Tensor, ref: Tensor) -> float:
    """``‖out - ref‖ / ‖ref‖`` in double precision; NaN if either holds one."""
    exact = ref.double()
    return float((out.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; -1 where that is not counted."""
    return -1 if tensor.is_inference() else tensor._version


def is_plain(layer: nn.Module) -> bool:
    """True for a layer whose call is its ``forward`` over its own plain weight and nothing else."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks)
    return not any(hooks) and type(layer.weight) in (nn.Parameter, Tensor) and not hasattr(layer, "parametrizations")


def shared_weights(module: nn.Module) -> set[int]:
    """The ids of the parameters that more than one module holds, such as an embedding tied to the head."""
    seen: set[int] = set()
    twice: set[int] = set()
    for _, parameter in module.named_parameters(remove_duplicate=False):
        (twice if id(parameter) in seen else seen).add(id(parameter))
    return twice

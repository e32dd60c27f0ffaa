"""Finding a model's outputs by running it: small test inputs, two sizes a symbol, names made unique."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import torch
from torch import Tensor

from onecard.errors import ModelError, SpecError
from onecard.models.flat import CallPlan, FlatModule, fill, named_leaves
from onecard.models.wording import first_line
from onecard.spec import DTYPES, Bucket, Range, Spec, TensorSpec, bucket_label, spec_of_outputs

Shapes = dict[str, tuple[str, tuple[int, ...]]]


def find_outputs(flat: FlatModule, spec: Spec) -> tuple[FlatModule, Spec]:
    """Run the model at two sizes of every symbol, and write down what it gives.

    Args:
        flat: in evaluation mode on the CPU; output names in its plan are kept if their number fits.
        spec: inputs and symbols.

    Returns:
        The flat module with its plan's outputs filled in, and the spec with outputs.

    Raises:
        SpecError: the model cannot be called with the spec's shapes, or its outputs do not follow them.
        ModelError: it gives no tensor, or one that no variant could carry.
    """
    first, second = probe_sizes(spec)
    outputs = _run(flat, spec, first)
    other: tuple[Mapping[str, object], Bucket] | None = None
    if any(first[name] != second[name] for name in first):
        repeat = _run(flat, spec, second)
        if list(repeat) != list(outputs):
            raise SpecError(
                f"the model gives {list(outputs)} at {bucket_label(first)}, but {list(repeat)} at "
                f"{bucket_label(second)}: its outputs must be the same at every size.",
                "Give a fixed size in --input.",
            )
        other = (repeat, second)
    plan = msgspec.structs.replace(flat.plan, outputs=tuple(outputs))
    moving = {name: size for name, size in first.items() if size != second[name]}
    found = FlatModule(flat.inner, plan).eval()
    return found, spec_of_outputs(spec, outputs, moving, other)


def probe_sizes(spec: Spec) -> tuple[Bucket, Bucket]:
    """Two small sizes for every symbol that no other symbol, nor one plus or times a constant, has as well."""
    first: Bucket = {}
    second: Bucket = {}
    for index, (name, rng) in enumerate(spec.symbols.items()):
        starts = [rng.low + 2 * index, *range(rng.low, min(rng.high, rng.low + 64))]
        pairs = [(a, a + step) for step in (index + 1, *range(1, 8)) for a in starts]
        pairs += [(b, a) for a, b in pairs]
        taken = [(first[n], second[n]) for n in first]
        fits = (p for p in pairs if p not in taken and p[0] in rng and p[1] in rng)
        first[name], second[name] = next(fits, (rng.low, rng.high))
    return first, second


def spec_at(spec: Spec, sizes: Bucket) -> Spec:
    """A spec with every symbol of ``sizes`` replaced by its size."""

    def settled(tensor: TensorSpec) -> TensorSpec:
        shape = tuple(sizes.get(d, d) if isinstance(d, str) else d for d in tensor.shape)
        return msgspec.structs.replace(tensor, shape=shape)

    left = {name: rng for name, rng in spec.symbols.items() if name not in sizes}
    return Spec(tuple(map(settled, spec.inputs)), tuple(map(settled, spec.outputs)), left)


def sample_inputs(spec: Spec, sizes: Bucket) -> list[Tensor]:
    """Test inputs in the spec's order: normal floats, integers in their range, masks of ones."""
    generator = torch.Generator().manual_seed(0)
    return [_sample(tensor, tensor.concrete(sizes), generator) for tensor in spec.inputs]


def _sample(tensor: TensorSpec, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    dtype = getattr(torch, tensor.dtype)
    if tensor.is_float:
        drawn = torch.randn(shape, generator=generator)
        if tensor.values is not None:
            low, high = tensor.values.low, tensor.values.high
            drawn = low + (high - low) * torch.rand(shape, generator=generator)
        return drawn.to(dtype)
    if "mask" in tensor.name.lower():
        return torch.ones(shape, dtype=dtype)
    values = tensor.values or Range(0, 1)
    return torch.randint(values.low, values.high + 1, shape, generator=generator).to(dtype)


def _run(flat: FlatModule, spec: Spec, sizes: Bucket) -> Shapes:
    tensors = dict(zip(flat.plan.inputs, sample_inputs(spec, sizes), strict=True))
    try:
        with torch.inference_mode():
            answer = call_original(flat, tensors)
    except Exception as error:  # the model's own code: anything may be raised
        shapes = ", ".join(f"{name}: {t.dtype}{list(t.shape)}".replace("torch.", "") for name, t in tensors.items())
        raise SpecError(
            f"the model could not be called with {shapes}: {first_line(error)}.",
            f"Say what it takes with --input (now: {spec}); a dimension it cannot vary must be a number.",
        ) from error
    leaves = list(named_leaves(answer))
    if not leaves:
        raise ModelError(
            f"the model's answer holds no tensor: it is a {type(answer).__name__}.",
            "Wrap the model so that forward returns tensors, or tuples, lists, dicts or dataclasses of them.",
        )
    names = unique_names([name for name, _ in leaves], flat.plan)
    shapes_found: Shapes = {}
    for name, (_, leaf) in zip(names, leaves, strict=True):
        dtype = str(leaf.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ModelError(
                f"the output '{name}' is of dtype {dtype}, expected one of {', '.join(DTYPES)}.",
                "Convert it in the model (torch.view_as_real for complex numbers).",
            )
        shapes_found[name] = (dtype, tuple(leaf.shape))
    return shapes_found


def call_original(flat: FlatModule, tensors: Mapping[str, Tensor]) -> object:
    """The original's own answer, containers and all, to named tensors."""
    args = [fill(template, tensors) for template in flat.plan.args]
    kwargs = {key: fill(template, tensors) for key, template in flat.plan.kwargs.items()}
    return flat.inner(*args, **kwargs)


def unique_names(names: list[str], plan: CallPlan) -> tuple[str, ...]:
    """Output names without repetition and different from every input, as ONNX and the protocol want them."""
    if len(plan.outputs) == len(names):
        return plan.outputs
    taken = set(plan.inputs)
    result = []
    for name in names:
        unique, count = name, 0
        while unique in taken:
            count += 1
            unique = f"{name}_out" if count == 1 else f"{name}_out{count}"
        taken.add(unique)
        result.append(unique)
    return tuple(result)

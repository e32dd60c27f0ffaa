"""What a module costs to run (FLOPs, parameters, bytes, time), and targets for one of these figures."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from onecard.errors import UsageError
from onecard.evidence import quantile
from onecard.inputs import make_inputs
from onecard.measure.timer import Effort, Stopwatch, no_garbage_collection
from onecard.models.flat import FlatModule
from onecard.spec import Bucket, Spec, default_buckets
from onecard.units import parse_duration, parse_size

_EFFORT = Effort(warmup_s=0.3, latency_s=0.4, period_s=0.01, min_samples=5, max_samples=100)
_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_COUNT = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgt]?)\s*$", re.IGNORECASE)
_SHARE = re.compile(r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$")
_FORMS = "Write it like flops=0.5, params=0.4, latency=0.6, latency=3ms, size=5MB or params=2M."


class Cost(msgspec.Struct, frozen=True):
    """What one call at one bucket costs.

    Args:
        flops: floating-point operations of matrix products, convolutions and attention (a multiply-add is two), or
            -1 where they were not counted.
        params: parameters, each stored tensor once.
        size_bytes: of all parameters and buffers, as they are stored.
        latency_ms: the median of single calls in eager mode, or None where it was not measured.
    """

    flops: int
    params: int
    size_bytes: int
    latency_ms: float | None = None

    def of(self, measure: str) -> float:
        """One of these figures by the name that a target has for it."""
        figures = {"flops": self.flops, "params": self.params, "size": self.size_bytes, "latency": self.latency_ms}
        return float(figures[measure] or 0.0)


MEASURES = ("flops", "params", "size", "latency")


class CostTarget(msgspec.Struct, frozen=True):
    """A cost to come down to.

    Args:
        measure: one of :data:`MEASURES`.
        value: a share of the original's, or an amount (FLOPs, parameters, bytes, milliseconds).
        is_share: which of the two it is.
    """

    measure: str
    value: float
    is_share: bool

    def __str__(self) -> str:
        if self.is_share:
            return f"{self.measure}={self.value:g}"
        return f"{self.measure}={show_amount(self.measure, self.value)}"

    def goal(self, original: Cost) -> float:
        """The amount that this means for a model.

        Raises:
            UsageError: the original costs no more than that already.
        """
        whole = original.of(self.measure)
        goal = self.value * whole if self.is_share else self.value
        if goal >= whole:
            raise UsageError(
                f"the target {self} is met by the model as it is ({show_amount(self.measure, whole)}).",
                "Ask for less than that.",
            )
        return goal


def parse_target(text: str) -> CostTarget:
    """Read a target such as ``flops=0.5`` or ``latency=3ms``.

    A bare number is a share of the original; one with a unit is an amount.

    Raises:
        UsageError: it cannot be read, or its share does not lie between 0 and 1.
    """
    measure, equals, value = (part.strip() for part in text.partition("="))
    if not equals or measure not in MEASURES:
        raise UsageError(f"cannot read the target '{text}': expected one of {', '.join(MEASURES)}.", _FORMS)
    if _SHARE.match(value):
        share = float(value)
        if not 0 < share < 1:
            raise UsageError(f"the target '{text}' is no share: expected a number between 0 and 1.", _FORMS)
        return CostTarget(measure, share, True)
    try:
        amount = _amount(measure, value)
    except UsageError as error:
        raise UsageError(f"cannot read the target '{text}': {error.message}", _FORMS) from error
    return CostTarget(measure, amount, False)


def _amount(measure: str, text: str) -> float:
    if measure == "latency":
        return parse_duration(text) * 1000
    if measure == "size":
        return float(parse_size(text))
    match = _COUNT.match(text)
    if match is None or not float(match[1]) > 0:
        raise UsageError(f"'{text}' is not a count such as 300M or 1.5G.")
    return float(match[1]) * _COUNTS[match[2].lower()]


def show_amount(measure: str, amount: float) -> str:
    """An amount as people write it: ``1.32G``, ``4.65M``, ``18.8MB``, ``3.21ms``."""
    if measure == "latency":
        return f"{amount:.3g}ms"
    units = [("G", 1e9), ("M", 1e6), ("k", 1e3)]
    mark, size = next(((mark, size) for mark, size in units if amount >= size), ("", 1.0))
    return f"{amount / size:.3g}{mark}" + ("B" if measure == "size" else "")


def bucket_of(spec: Spec) -> Bucket:
    """The sizes at which costs are told: the first that the search would time."""
    buckets = default_buckets(spec)
    return buckets[0] if buckets else {}


def measure_cost(module: FlatModule, spec: Spec, device: str, measures: Sequence[str] = ("flops",)) -> Cost:
    """What a call of a module costs at :func:`bucket_of`.

    Args:
        module: in evaluation mode, on the device.
        spec: of the model.
        device: ``cpu`` or ``cuda:0``.
        measures: which of FLOPs and latency to find, those that need a run.
    """
    made = make_inputs(spec, bucket_of(spec))
    inputs = {name: tensor.to(device) for name, tensor in made.items()}
    flops = _count_flops(module, spec, inputs) if "flops" in measures else -1
    latency = _time(module, spec, inputs, device) if "latency" in measures else None
    return Cost(flops, count_params(module), count_bytes(module), latency)


def count_params(module: nn.Module) -> int:
    """Parameters of a module; one that is used twice counts once."""
    return sum(p.numel() for p in module.parameters())


def count_bytes(module: nn.Module) -> int:
    """Bytes of the parameters and of the buffers that are saved with them, each stored tensor once."""
    unique = {(t.data_ptr(), t.shape): t.nbytes for t in module.state_dict().values() if isinstance(t, Tensor)}
    return sum(unique.values())


def _count_flops(module: FlatModule, spec: Spec, inputs: dict[str, Tensor]) -> int:
    # The counter knows neither the fused encoder layer nor the CPU's flash attention.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            module(*(inputs[t.name] for t in spec.inputs))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return int(counter.get_total_flops())


def _time(module: FlatModule, spec: Spec, inputs: dict[str, Tensor], device: str) -> float:
    def run(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.inference_mode():
            outputs = module(*(tensors[t.name] for t in spec.inputs))
        return dict(enumerate(outputs))  # type: ignore[arg-type] # nobody reads the names

    watch = Stopwatch(run, [inputs], device, bucket_of(spec), 1)
    watch.warm_up(_EFFORT)
    with no_garbage_collection():
        watch.sample(_EFFORT)
    return quantile(watch.samples_ms, 0.5)

"""What a memory plan is made of: predictions, measurements, buckets and advice. Plain data, no torch."""

from __future__ import annotations

import msgspec

from onecard.evidence import Verdict
from onecard.spec import Bucket, Spec, bucket_label


class Prediction(msgspec.Struct, frozen=True):
    """What a forward pass holds at its peak, from shapes alone. All sizes in bytes.

    Args:
        road: ``as written`` (the module's own code) or ``captured`` (its graph, freed at the last use).
        weights_bytes: parameters and buffers, shared ones once.
        inputs_bytes: of one call; the caller holds them throughout.
        outputs_bytes: memory that the answers alone hold; none where they are views of inputs or weights.
        answer_bytes: the answers' elements, which is what a staging slot holds.
        activations_bytes: at the peak, beside weights, inputs and outputs.
        peak_layer: the layer that runs then.
        peak_tensors: how many tensors are alive then that the pass itself made.
        peak_bytes: of these tensors.
        reserved_bytes: what PyTorch's CUDA allocator would take for weights, inputs and the pass.
        convolution_bytes: input, weight and output of the largest convolution; 0 without one.
        has_products: whether a matrix product runs.
    """

    road: str
    weights_bytes: int
    inputs_bytes: int
    outputs_bytes: int
    answer_bytes: int
    activations_bytes: int
    peak_layer: str = ""
    peak_tensors: int = 0
    peak_bytes: int = 0
    reserved_bytes: int = 0
    convolution_bytes: int = 0
    has_products: bool = False

    @property
    def live_bytes(self) -> int:
        """The most that is alive at once."""
        return self.weights_bytes + self.inputs_bytes + self.outputs_bytes + self.activations_bytes


class MemoryPart(msgspec.Struct, frozen=True):
    """One thing that memory goes to.

    Args:
        name: ``weights``, ``inputs``, ``outputs``, ``activations``, ``workspace``, ``graphs``, ``slack`` or
            ``staging``.
        nbytes: how much.
        note: where the figure comes from.
    """

    name: str
    nbytes: int
    note: str = ""


class Measured(msgspec.Struct, frozen=True):
    """What one call at one size really took, in a process of its own. All sizes in bytes.

    Args:
        loaded_bytes: held once the model was loaded: its weights.
        allocated_bytes: the peak of PyTorch's allocator, or on a CPU the weights and the growth of the resident set.
        reserved_bytes: what the allocator had taken from the driver; on a CPU the same as ``allocated_bytes``.
        outside_bytes: taken from the driver by others than PyTorch meanwhile, without the CUDA context.
        limit_bytes: the limit that the allocator was held to; 0 where there is none.
        how: ``cuda``, ``clear_refs`` or ``sampled``, the means by which the peak was found.
        seconds: that the process took, loading included.
    """

    loaded_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    outside_bytes: int = 0
    limit_bytes: int = 0
    how: str = ""
    seconds: float = 0.0

    @property
    def peak_bytes(self) -> int:
        """What was in use at once."""
        return self.allocated_bytes + self.outside_bytes


class BucketPlan(msgspec.Struct, frozen=True):
    """One size: where the memory goes, what was measured, and whether it fits.

    Args:
        bucket: the size of every symbol.
        variant: the recipe that serves it in a bundle, or ``as given`` for a model.
        parts: the prediction by part; where nothing could be predicted, what the slots take at most.
        peak: where the peak is: ``layer2.0.conv1: 3 tensors, 412 MiB``.
        measured: what a call took, or None.
        verdict: of the measurement: ``ok``, ``skipped`` (not measured), or why it failed.
        fits: under the limit, staging included; None where nothing tells, or where it was run and failed otherwise.
        note: why there is no prediction, if there is none.
    """

    bucket: Bucket
    variant: str = "as given"
    parts: tuple[MemoryPart, ...] = ()
    peak: str = ""
    measured: Measured | None = None
    verdict: Verdict = Verdict("skipped", "not measured")
    fits: bool | None = None
    note: str = ""

    @property
    def label(self) -> str:
        return bucket_label(self.bucket)

    def part(self, name: str) -> int:
        """Bytes of one part; 0 if it has none."""
        return sum(part.nbytes for part in self.parts if part.name == name)

    @property
    def call_bytes(self) -> int | None:
        """What one call is predicted to take, weights included; None without a prediction."""
        call = [part.nbytes for part in self.parts if part.name != "staging"]
        return sum(call) if call else None

    @property
    def failed(self) -> bool:
        """It was run, and gave no answer."""
        return self.verdict.reason not in ("ok", "skipped")

    @property
    def staging_bytes(self) -> int:
        """What the slots take beside the call that runs."""
        return self.part("staging")

    @property
    def predicted_bytes(self) -> int | None:
        """What serving at this size is predicted to take: one call and the other slots."""
        return None if self.call_bytes is None else self.call_bytes + self.staging_bytes

    @property
    def need_bytes(self) -> int | None:
        """The best figure for serving at this size: measured if it was, else predicted."""
        if self.measured is not None and self.verdict.ok:
            return self.measured.peak_bytes + self.staging_bytes
        return self.predicted_bytes


class LargestBatch(msgspec.Struct, frozen=True):
    """The largest batch that fits.

    Args:
        batch: rows; 0 if not even the smallest fits.
        bucket: its whole size.
        need_bytes: what it takes, staging included.
        verified: measured, and not only predicted.
        is_range_end: the spec allows no larger one.
    """

    batch: int
    bucket: Bucket
    need_bytes: int
    verified: bool
    is_range_end: bool


class Advice(msgspec.Struct, frozen=True):
    """One thing that would help.

    Args:
        what: an instruction.
        need_bytes: what would be needed then at the size that the advice is for.
        basis: ``predicted`` or ``measured``.
        fits: whether that is under the limit.
    """

    what: str
    need_bytes: int
    basis: str
    fits: bool


class MemoryPlan(msgspec.Struct, frozen=True):
    """Everything that ``onecard plan`` found out.

    Args:
        model: its name.
        source: ``model`` or ``bundle``.
        device: ``cpu``, ``cuda:0`` ...
        precision: ``fp32``, ``fp16`` or ``bf16``; of a bundle, that of its variants by bucket.
        spec: inputs, outputs and symbols.
        limit_bytes: what may be used.
        total_bytes: what the device has; 0 if unknown.
        depth: staging slots.
        buckets: one plan for each size, those tried for the largest batch included.
        largest: the largest batch that fits, or None where there is no batch dimension or nothing could tell.
        advice: what would make the largest size fit, the cheapest first; empty if it does.
        advice_for: the size that the advice is for.
        notes: what else the user should know.
    """

    model: str
    source: str
    device: str
    precision: str
    spec: Spec
    limit_bytes: int
    total_bytes: int
    depth: int
    buckets: tuple[BucketPlan, ...]
    largest: LargestBatch | None = None
    advice: tuple[Advice, ...] = ()
    advice_for: Bucket = {}
    notes: tuple[str, ...] = ()

    def bucket(self, bucket: Bucket) -> BucketPlan | None:
        return next((b for b in self.buckets if b.bucket == bucket), None)

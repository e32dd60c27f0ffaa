"""What a backend is: module -> artifact folder, and artifact folder -> runner."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from onecard.evidence import Verdict
from onecard.recipe import Recipe
from onecard.spec import Bucket, Spec

if TYPE_CHECKING:
    from torch import Tensor

    from onecard.calibration.bench import Bench
    from onecard.models.flat import FlatModule

Tensors = dict[str, "Tensor"]


@dataclass(frozen=True)
class Target:
    """What an artifact is built for, and all that loading it may need.

    Args:
        recipe: transforms, backend and mode.
        spec: inputs, outputs and symbols.
        device: ``cpu`` or ``cuda:N``.
        bucket: the one size of a static artifact, or None for the whole range of the spec.
        source: the folder of the original model (see ``onecard.models.source``).
        shared: a folder of the variant where artifacts of its buckets may share files.
        work: a folder for the backend's own caches while building; it does not ship.
        memo: what the artifacts of one variant may share in memory while it is loaded (weights, mostly).
        bench: calibration rows and the judge of compressed trials; only while building.
        device_memory: most bytes of the device's memory to use; None for all that is free.
    """

    recipe: Recipe
    spec: Spec
    device: str
    bucket: Bucket | None
    source: Path
    shared: Path
    work: Path | None = None
    memo: dict[Any, Any] = field(default_factory=dict, compare=False)
    bench: Bench | None = None
    device_memory: int | None = None

    def native(self, backend: Backend) -> str:
        """The one transform of the recipe that the backend does itself, or empty."""
        return next((t for t in self.recipe.transforms if t in native_transforms(backend)), "")


class Runner(Protocol):
    """A loaded variant: named tensors in, named tensors out, all on the target's device.

    Inputs must have the dtypes of the spec, be contiguous and, for a static artifact, have just its
    bucket's shapes. The answers are the caller's own: no later call may change them.
    """

    def __call__(self, inputs: Tensors) -> Tensors:
        """Run once; on a GPU the answer may still be under way on the current stream."""
        ...

    def close(self) -> None:
        """Release what the runner holds."""
        ...


class Backend(Protocol):
    """One way to run a module. Stateless; made anew for every use.

    A backend with a quantiser of its own lists the transforms that it does itself, while it builds, in a class
    attribute ``native`` (a frozenset of names); the module then comes without them.
    """

    def available(self, target: Target) -> Verdict | None:
        """None if it can run here, else a verdict ``unavailable`` with its cure. Must be cheap."""
        ...

    def build(self, module: FlatModule, inputs: Tensors, folder: Path, target: Target) -> None:
        """Write the artifact of a transformed module into an empty folder.

        Args:
            module: on the target's device, in evaluation mode, transforms applied; forward takes the
                spec's inputs positionally, in the spec's order and dtypes, and returns a tuple in the order of
                its outputs.
            inputs: example inputs on the device; of the bucket's shapes if the target is static.
            folder: exists and is empty; nothing may be a Python pickle.
            target: what to build for.

        Raises:
            Unsupported: this model cannot be built this way.
        """
        ...

    def load(self, folder: Path, target: Target) -> Runner:
        """Make a runner from an artifact, in a process that has not seen the model."""
        ...


def native_transforms(backend: Backend) -> frozenset[str]:
    """The names of the transforms that a backend does itself."""
    found: frozenset[str] = getattr(backend, "native", frozenset())
    return found

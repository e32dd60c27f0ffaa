"""One size measured in a process of its own: ``python -m onecard.memory.worker JOB.json``.

What goes wrong is written as a verdict; only a signal leaves none.
"""

from __future__ import annotations

import gc
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from onecard.bundle.manifest import SOURCE, VARIANTS
from onecard.bundle.variant import Site, load_variant
from onecard.device_memory import limit_device_memory
from onecard.errors import OnecardError, Unsupported
from onecard.evidence import Verdict
from onecard.inputs import make_inputs
from onecard.measure.memory import MemoryWatch
from onecard.memory.figures import Measured
from onecard.memory.liveness import DTYPES, cast_around
from onecard.memory.measure import Job, Outcome
from onecard.memory.resident import PeakWatch, resident_bytes, return_free_memory
from onecard.memory.trace import storage_bytes
from onecard.models.flat import FlatModule, by_name
from onecard.models.onnx_module import OnnxModule
from onecard.models.source import load_source
from onecard.models.wording import first_line
from onecard.search.processes import die_with_parent
from onecard.transforms.precision import precision_scope

_CALLS = 3  # the first builds what later ones reuse; the peak is that of all
_GIB = float(1 << 30)

Run = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def main(arguments: list[str]) -> int:
    """Entry of the process; see the module's docstring."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the plan's to handle
    job = msgspec.json.decode(Path(arguments[0]).read_bytes(), type=Job)
    outcome = _guarded(job)
    result = Path(job.result)
    aside = result.with_suffix(".new")
    aside.write_bytes(msgspec.json.encode(outcome))
    aside.replace(result)
    return 0


def _guarded(job: Job) -> Outcome:
    """Measure, and turn whatever is raised into a verdict; the traceback goes to the log."""
    try:
        return Outcome(Verdict("ok"), (_measure_cpu if job.device == "cpu" else _measure_cuda)(job))
    except Unsupported as error:
        return Outcome(Verdict("unsupported", error.detail, error.cure))
    except OnecardError as error:
        return Outcome(Verdict("unavailable", error.message, error.cure))
    except Exception as error:
        traceback.print_exc()
        exhausted = isinstance(error, MemoryError | torch.OutOfMemoryError)
        text = str(error).lower()
        if exhausted or "out of memory" in text or "can't allocate memory" in text:
            limit = (
                f"at the limit of {job.limit_bytes / _GIB:.2f} GiB: " if job.limit_bytes and job.device != "cpu" else ""
            )
            return Outcome(Verdict("out_of_memory", f"{limit}{first_line(error)}"))
        return Outcome(Verdict("crashed", first_line(error), "Run the model by itself to see the whole error."))


def _measure_cuda(job: Job) -> Measured:
    """The allocator's peaks under the real limit, and what the driver gave to others meanwhile."""
    started = time.monotonic()
    watch = MemoryWatch(job.device)
    if job.limit_bytes:
        limit_device_memory(job.device, job.limit_bytes)
    loaded = _load(job)
    watch.loaded()
    loaded_bytes = int(torch.cuda.memory_allocated(job.device))
    inputs = {name: t.to(job.device) for name, t in make_inputs(job.spec, job.bucket).items()}
    _stage(job, "running")
    for _ in range(_CALLS):
        loaded.run(inputs)
    return Measured(
        loaded_bytes=loaded_bytes,
        allocated_bytes=watch.peak_allocated_bytes(),
        reserved_bytes=watch.peak_reserved_bytes(),
        outside_bytes=watch.outside_bytes(),
        limit_bytes=job.limit_bytes,
        how="cuda",
        seconds=time.monotonic() - started,
    )


def _measure_cpu(job: Job) -> Measured:
    """Weights, inputs, and the growth of the resident set over this process with the model loaded and idle."""
    started = time.monotonic()
    loaded = _load(job)
    before = 0
    if loaded.weights_bytes is None:
        # The weights are what loading takes, and only the second time: the first brings the engine's libraries.
        loaded.close()
        del loaded
        before = _settled_bytes()
        loaded = _load(job)
    inputs = make_inputs(job.spec, job.bucket)
    idle = _settled_bytes()
    given = storage_bytes(inputs.values())
    weights = max(0, idle - before - given) if loaded.weights_bytes is None else loaded.weights_bytes
    _stage(job, "running")
    with PeakWatch() as watch:
        for _ in range(_CALLS):
            loaded.run(inputs)
    peak = weights + given + max(0, watch.peak_bytes - idle)
    return Measured(weights, peak, peak, how=watch.how, seconds=time.monotonic() - started)


def _settled_bytes() -> int:
    """What is resident once all that is not used any more was given back."""
    gc.collect()
    return_free_memory()
    return resident_bytes()


class _Loaded(NamedTuple):
    """What answers, how it ends, and the bytes of its weights where they are a module's."""

    run: Run
    close: Callable[[], None]
    weights_bytes: int | None


def _load(job: Job) -> _Loaded:
    _stage(job, "loading")
    folder = Path(job.folder)
    if job.recipe is not None:
        variant = folder / VARIANTS / job.recipe.id
        limit = job.limit_bytes or None
        site = Site(job.spec, job.buckets, job.device, folder / SOURCE, limit)
        runner = load_variant(variant, job.recipe, site)
        return _Loaded(runner, runner.close, None)
    flat = load_source(folder, allow_live=True).flat
    dtype = DTYPES[job.precision]
    if dtype is not None and isinstance(flat.inner, OnnxModule):
        raise Unsupported("an ONNX file runs in its own precision", "Leave out --precision.")
    module = cast_around(flat, job.spec, dtype)
    if dtype is not None:
        module.inner.to(dtype)
    module = module.to(job.device)

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.inference_mode(), precision_scope("fp32"):
            return by_name(module, job.spec, inputs)

    return _Loaded(run, lambda: None, _touched(module))


def _touched(module: FlatModule) -> int | None:
    """Bytes of a module's weights, each read once since pages of a file are resident only then.

    None where another library holds them.
    """
    tensors = [*module.parameters(), *module.buffers()]
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.numel():
            tensor.detach().reshape(-1).view(torch.uint8)[::1024].max()
    return None if isinstance(module.inner, OnnxModule) else storage_bytes(tensors)


def _stage(job: Job, text: str) -> None:
    Path(job.stage).write_text(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

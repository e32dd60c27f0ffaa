"""One candidate's work in a process of its own: ``python -m onecard.search.worker ROLE JOB [RECIPE ...]``.

Roles: ``reference`` (the original's answers), ``build`` (artifacts into the candidate's folder), ``run`` (load
them back, verify, time) and ``playoff`` (the finalists in turn). Files in, files out: the command line
reproduces what the search did. What goes wrong is written as a verdict; only a signal leaves none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from onecard.backends import get_backend
from onecard.backends.base import native_transforms
from onecard.bundle.variant import Site, VariantRunner, artifact_targets, load_variant
from onecard.device_memory import limit_device_memory
from onecard.errors import MissingDependencyError, SearchError, Unsupported
from onecard.evidence import Compression, Measurement, Metric, Timing, Verdict
from onecard.inputs import make_inputs
from onecard.measure.card import CardSampler, is_throttled
from onecard.measure.memory import MemoryWatch
from onecard.measure.timer import Effort, Stopwatch, measure, no_garbage_collection, rotation, synchronise
from onecard.models.flat import by_name
from onecard.models.source import load_source, read_source
from onecard.recipe import ORIGINAL, Recipe
from onecard.search.bench import load_rows, make_bench, real_inputs
from onecard.search.job import BuildResult, CandidateFolder, Job, JobFolder, PlayoffResult, RunResult, write
from onecard.search.processes import ON_CALL, die_with_parent
from onecard.search.recipes import parse_recipe
from onecard.spec import Bucket
from onecard.transforms import apply_transforms
from onecard.transforms.precision import precision_scope
from onecard.verify.cases import Case, make_cases
from onecard.verify.compare import rounding_error
from onecard.verify.data import Dataset
from onecard.verify.evaluate import answers_of, evaluate
from onecard.verify.gate import Gate
from onecard.verify.reference import Run, compute_reference, read_reference, to_device, write_reference

_GLANCE = Effort(0.1, 0.1, 0.05, 3, 20)  # for a wrong variant: enough to say what it would have been worth
_SETTLING_SHARE = 0.5  # of the time for a build; the artifacts themselves need the rest
_MAX_PLAYOFFS = 2  # a round in which the card slowed itself down is played again


def main(arguments: list[str]) -> int:
    """Entry of a worker process; see the module's docstring."""
    role, folder, *recipes = arguments
    die_with_parent()
    if ON_CALL in os.environ:
        _preload(JobFolder(Path(folder)), recipes[0])
        sys.stdin.readline()  # the search says when the machine is ours
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the search's to handle
    job = JobFolder(Path(folder))
    if role == "reference":
        make_reference(job)
    elif role == "build":
        build_candidate(job, parse_recipe(recipes[0]), float(recipes[1]) if len(recipes) > 1 else 0.0)
    elif role == "run":
        run_candidate(job, parse_recipe(recipes[0]), float(recipes[1]) if len(recipes) > 1 else 0.0)
    elif role == "playoff":
        play_off(job, [parse_recipe(r) for r in recipes])
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


def make_reference(folder: JobFolder) -> None:
    """Run the original in fp32 on every case and write its answers; on the CPU if the device cannot hold it."""
    job = folder.read_job()
    try:
        _make_reference(folder, job, ())
    except torch.OutOfMemoryError:
        note = "the original does not fit in the device's memory: its answers were computed on the CPU"
        _make_reference(folder, msgspec.structs.replace(job, device="cpu"), (note,))


def _make_reference(folder: JobFolder, job: Job, notes: tuple[str, ...]) -> None:
    model = load_source(folder.source, allow_live=True)
    module = model.flat.to(job.device)
    data = load_rows(folder, job)

    def run(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.inference_mode(), precision_scope("fp32"):
            return by_name(module, job.spec, inputs)

    folder.reference.mkdir(exist_ok=True)
    cases = make_cases(job.spec, job.buckets)
    rows = data.inputs if data else real_inputs(folder, job)
    found = compute_reference(run, job.spec, cases, folder.reference, rows, job.device)
    metric = _evaluate(run, job, data) if job.metric and data else None
    found = msgspec.structs.replace(found, metric=metric, notes=(*notes, *found.notes))
    write_reference(found, folder.reference)
    error = _fp64_error(run, module, job, cases[0], rows)  # last: it may take more memory than there is
    write_reference(msgspec.structs.replace(found, fp64_error=error), folder.reference)


def _site(folder: JobFolder, job: Job) -> Site:
    """Where the job's variants run."""
    return Site(job.spec, job.buckets, job.device, folder.source, job.device_memory)


def build_candidate(folder: JobFolder, recipe: Recipe, limit_s: float) -> None:
    """Build every artifact of a recipe, within ``limit_s`` if it is not 0, and write the verdict."""
    place = folder.candidate(recipe)
    started = time.perf_counter()
    found: list[Compression] = []
    with warnings.catch_warnings(record=True) as caught:
        verdict = _guarded(lambda: _build(folder, recipe, place, found, limit_s))
    seconds = time.perf_counter() - started
    write(place.build, BuildResult(verdict, seconds, _texts(caught), tuple(found)))


def _build(
    folder: JobFolder, recipe: Recipe, place: CandidateFolder, found: list[Compression], limit_s: float
) -> Verdict:
    job = folder.read_job()
    shutil.rmtree(place.variant, ignore_errors=True)
    place.variant.mkdir(parents=True)
    backend = get_backend(recipe.backend)
    targets = list(artifact_targets(place.variant, recipe, _site(folder, job)))
    refusal = backend.available(targets[0][1])
    if refusal is not None:
        return refusal
    example = job.buckets[0] if job.buckets else {}
    batch = job.spec.batch_symbol
    least = {**example, batch: job.spec.symbols[batch].low} if batch else example  # transforms only look how it runs
    _stage(place, "loading the model")
    on_host = getattr(backend, "builds_on_host", False)  # for what may be larger than the device's memory
    place_of_build = "cpu" if on_host else job.device
    module = load_source(folder.source, allow_live=True).flat.to(place_of_build)
    inputs = to_device(make_inputs(job.spec, least), place_of_build)
    work, bench = place.root / "work", None
    if recipe.compressions:
        work.mkdir(exist_ok=True)
        bench = make_bench(folder, recipe, module, inputs, lambda text: _stage(place, text), found)
        if limit_s:
            bench = dataclasses.replace(bench, deadline=time.monotonic() + limit_s * _SETTLING_SHARE)
    ours = [name for name in recipe.transforms if name not in native_transforms(backend)]
    with precision_scope(recipe.precision):
        module = apply_transforms(module, ours, inputs, bench)
        for artifact, target in targets:
            _stage(place, f"building {artifact.name}")
            artifact.mkdir()
            bucket = target.bucket if target.bucket is not None else example
            inputs = to_device(make_inputs(job.spec, bucket), place_of_build)
            backend.build(module, inputs, artifact, dataclasses.replace(target, work=work, bench=bench))
    shutil.rmtree(work, ignore_errors=True)
    return Verdict("ok")


def run_candidate(folder: JobFolder, recipe: Recipe, limit_s: float) -> None:
    """Load a built candidate, verify it, time it, and write all that was found."""
    place = folder.candidate(recipe)
    started = time.perf_counter()
    found = RunResult(Verdict("crashed"))

    def work() -> Verdict:
        nonlocal found
        found = _run(folder, recipe, place)
        return found.verdict

    with warnings.catch_warnings(record=True) as caught:
        verdict = _guarded(work)
    seconds = time.perf_counter() - started
    write(
        place.result,
        RunResult(
            verdict, found.measurement, found.errors, found.metric, (*found.warnings, *_texts(caught)), seconds, limit_s
        ),
    )


def _run(folder: JobFolder, recipe: Recipe, place: CandidateFolder) -> RunResult:
    job = folder.read_job()
    data = load_rows(folder, job)
    inputs = data.inputs if data else real_inputs(folder, job)
    if job.device_memory is not None and recipe != ORIGINAL:
        limit_device_memory(job.device, job.device_memory)
    card, memory = CardSampler(job.device), MemoryWatch(job.device)
    _stage(place, "loading")
    started = time.perf_counter()
    run = load_variant(place.variant, recipe, _site(folder, job))
    load_s = time.perf_counter() - started
    memory.loaded()
    first_ms = _first_calls(run, job, inputs, lambda bucket: _stage(place, f"first call at {bucket}"))
    peaks = memory.peak_device_bytes(), memory.peak_process_bytes()  # before the gate and the timing hold tensors too
    gate = Gate(
        job.spec,
        read_reference(folder.reference),
        folder.reference,
        job.thresholds[recipe.tolerance],
        job.device,
        inputs,
        only_sane=bool(job.metric),
    )
    verdict = gate.judge(run, lambda case: _stage(place, f"verifying {case}"))
    metric = None
    if verdict.ok and job.metric and data is not None:
        _stage(place, f"measuring {job.metric}")
        if gate.reference.metric is None:
            raise SearchError(f"the original's own {job.metric} is not known: nothing can be held to it.")
        metric = Metric(job.metric, _evaluate(run, job, data), gate.reference.metric, data.rows)
        verdict = _judge_metric(metric, job.max_drop)
    timings: list[Timing] = []
    notes: list[str] = []
    effort = _effort(job) if verdict.ok else _GLANCE
    for bucket, first in zip(_timed(job), first_ms, strict=True):
        _stage(place, f"timing {bucket}")
        timing, wide = measure(_stopwatch(run, job, bucket, inputs, first), effort, card)
        timings.append(timing)
        notes += wide if verdict.ok else []
    measurement = Measurement(tuple(timings), 0.0, load_s, *peaks, _size(place, folder))
    run.close()
    return RunResult(verdict, measurement, tuple(gate.errors.values()), metric, tuple(notes))


def play_off(folder: JobFolder, recipes: list[Recipe]) -> None:
    """Load the finalists together and time them in turn, A B C A B C, so that drift hits all alike."""
    job = folder.read_job()
    inputs = real_inputs(folder, job)
    card = CardSampler(job.device)
    runners: dict[str, VariantRunner] = {}
    absent: dict[str, str] = {}
    for recipe in recipes:
        place = folder.candidate(recipe)
        try:
            runners[recipe.id] = load_variant(place.variant, recipe, _site(folder, job))
        except Exception as error:  # one finalist must not keep the others from playing
            absent[recipe.id] = f"{type(error).__name__}: {error}"
    timings: dict[str, list[Timing]] = {name: [] for name in runners}
    for bucket in _timed(job):
        watches = {name: _stopwatch(run, job, bucket, inputs) for name, run in runners.items()}
        total = _effort(job)
        rounds = job.effort.playoff_rounds
        turn = Effort(total.warmup_s / 2, total.latency_s / rounds, total.period_s / rounds, 3, 60)
        for _ in range(_MAX_PLAYOFFS):
            for watch in watches.values():
                watch.clear()
                watch.warm_up(turn)
            before = card.read()
            with no_garbage_collection():
                for _ in range(rounds):
                    for watch in watches.values():
                        watch.sample(turn)
            after = card.read()
            if not is_throttled(after):
                break
        for name, watch in watches.items():
            timings[name].append(watch.timing(before, after))
    write(folder.playoff, PlayoffResult({name: tuple(t) for name, t in timings.items()}, absent))


def _first_calls(run: Run, job: Job, data: dict[str, Tensor] | None, tell: Callable[[Bucket], None]) -> list[float]:
    """Milliseconds of each size's very first call, which may still compile, allocate or tune.

    One call's tensors at a time are held, so that the peak of memory is the variant's own.
    """
    found = []
    for bucket in _timed(job):
        tell(bucket)
        inputs = _inputs(job, bucket, 0, data)
        synchronise(job.device)
        start = time.perf_counter_ns()
        outputs = run(inputs)
        synchronise(job.device)
        found.append((time.perf_counter_ns() - start) / 1e6)
        del inputs, outputs
    return found


def _stopwatch(
    run: Run, job: Job, bucket: Bucket, data: dict[str, Tensor] | None, first_call_ms: float = 0.0
) -> Stopwatch:
    batch = job.spec.batch_symbol
    rows = bucket[batch] if batch else 1
    inputs = rotation(lambda index: _inputs(job, bucket, index, data))
    return Stopwatch(run, inputs, job.device, bucket, rows, first_call_ms=first_call_ms)


def _inputs(job: Job, bucket: Bucket, index: int, data: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Set number so and so of the inputs that are timed, on the device."""
    return to_device(make_inputs(job.spec, bucket, seed=100 + index, data=data), job.device)


def _timed(job: Job) -> tuple[Bucket, ...]:
    return job.buckets or ({},)


def _effort(job: Job) -> Effort:
    return Effort(job.effort.warmup_s, job.effort.latency_s, job.effort.period_s)


def _evaluate(run: Run, job: Job, data: Dataset) -> float:
    """The metric of a variant over all of the data."""
    return evaluate(answers_of(run, job.spec, data, job.device), data, job.metric)


def _judge_metric(metric: Metric, max_drop: float) -> Verdict:
    if metric.drop <= max_drop:
        return Verdict("ok")
    return Verdict(
        "wrong",
        f"{metric.name} fell from {metric.original:.4f} to {metric.value:.4f} on {metric.samples} samples, "
        f"more than {max_drop:g}",
        "Raise --max-drop if that loss is acceptable.",
    )


def _fp64_error(
    run: Run, module: torch.nn.Module, job: Job, case: Case, data: dict[str, Tensor] | None
) -> float | None:
    """The rounding error of the fp32 original itself, where the model runs in fp64 at all."""
    inputs = to_device(make_inputs(job.spec, case.bucket, seed=case.seed, ragged=case.ragged, data=data), job.device)
    try:
        single = run(inputs)
        module.double()
        wide = {name: t.double() if t.dtype == torch.float32 else t for name, t in inputs.items()}
        exact = run(wide)
    except Exception:  # fp64 is a courtesy: mixed dtypes inside, or no kernel for it
        return None
    return rounding_error(single, exact, case.name)


def _guarded(work: Callable[[], Verdict]) -> Verdict:
    """Run something and turn whatever it raises into a verdict; the traceback goes to the log."""
    try:
        return work()
    except Unsupported as error:
        return Verdict("unsupported", error.detail, error.cure)
    except MissingDependencyError as error:
        return Verdict("unavailable", error.message, error.cure)
    except (torch.OutOfMemoryError, MemoryError) as error:
        traceback.print_exc()
        return Verdict("out_of_memory", _first_line(error), "Use smaller buckets (--batch) or a half-precision recipe.")
    except Exception as error:
        traceback.print_exc()
        if "out of memory" in str(error).lower() or "can't allocate memory" in str(error).lower():
            return Verdict("out_of_memory", _first_line(error), "Use smaller buckets (--batch).")
        return Verdict("crashed", f"{type(error).__name__}: {_first_line(error)}", "The log has the whole traceback.")


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def _texts(caught: list[warnings.WarningMessage]) -> tuple[str, ...]:
    """Warnings that matter to a user: those of onecard itself; others go to the log."""
    for item in caught:
        print(f"warning: {item.category.__name__}: {item.message}", file=sys.stderr)
    return tuple(
        dict.fromkeys(str(w.message) for w in caught if w.filename.find("onecard") >= 0 and w.category is UserWarning)
    )


def _size(place: CandidateFolder, folder: JobFolder) -> int:
    """Bytes on disk that this variant needs: its own, and the original's weights where it builds on them."""
    own = sum(path.stat().st_size for path in place.variant.rglob("*") if path.is_file())
    notes = list(place.variant.rglob("eager.json"))
    if any(b"source" in note.read_bytes() for note in notes):
        needed = (folder.source / name for name in ("weights.safetensors", "model.ts", "model.onnx"))
        own += sum(path.stat().st_size for path in needed if path.exists())
    return own


def _stage(place: CandidateFolder, text: str) -> None:
    """Tell the search what is going on; it looks now and then."""
    place.stage.write_text(text)


def _preload(folder: JobFolder, recipe_id: str) -> None:
    """Import what the run will need, so that the wait for its turn is not wasted."""
    recipe = parse_recipe(recipe_id)
    get_backend(recipe.backend)
    wanted = {"hf": "transformers", "torchvision": "torchvision", "timm": "timm"}
    modules = [wanted.get(read_source(folder.source).origin.kind, "")]
    if "inductor" in (recipe.backend, recipe.mode):
        modules.append("torch._inductor.async_compile")
    for name in filter(None, modules):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

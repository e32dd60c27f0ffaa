"""Structured pruning: channels are removed step by step until a target is met, with fine-tuning in between."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from onecard.cache.use import in_use
from onecard.errors import ModelError, SearchError, UsageError
from onecard.host import cache_folder
from onecard.models.flat import FlatModule
from onecard.models.model import Model
from onecard.models.probe import probe_sizes, sample_inputs
from onecard.training.channels import (
    LEAST_SHARE,
    Choice,
    Inputs,
    Limits,
    Removal,
    display_name,
    find_groups,
    remove,
    trainable_copy,
)
from onecard.training.checkpoint import run_key
from onecard.training.cost import Cost, CostTarget, measure_cost, parse_target, show_amount
from onecard.training.data import TrainingData, split_rows
from onecard.training.importance import accumulate_gradients, join, rank_blocks
from onecard.training.loop import TrainHistory, TrainProgress, fine_tune
from onecard.training.prune_options import PruneOptions, PruneProgress
from onecard.training.prune_result import (
    PruneResult,
    Score,
    check_exportable,
    check_output,
    describe_layers,
    write_result,
)
from onecard.training.prune_state import PruneFolder, PruneStep, Saved, with_changes
from onecard.training.yardstick import Yardstick, make_yardstick
from onecard.verify.data import Dataset, digest_of

_HELD_OUT = 0.1
_STEADY_BATCH = 8  # batch statistics of fewer rows are too noisy to train with
_LATENCY_MARGIN = 1.05

Observe = Callable[[PruneProgress], None]


@dataclass(frozen=True)
class _Job:
    """What stays the same throughout one pruning."""

    model: Model
    target: CostTarget
    options: PruneOptions
    data: TrainingData | None
    yardstick: Yardstick | None
    probes: tuple[Inputs, ...]
    folder: PruneFolder
    observe: Observe

    @property
    def device(self) -> str:
        return self.options.training.device

    @property
    def steps(self) -> int:
        return self.options.steps if self.data is not None and self.options.training.epochs else 1

    def tell(self, what: str, step: int = 0, train: TrainProgress | None = None) -> None:
        self.observe(PruneProgress(what, step, self.steps, train))

    def cost(self, module: FlatModule, *measures: str) -> Cost:
        return measure_cost(module, self.model.spec, self.device, measures or (self.target.measure,))


def prune(  # noqa: PLR0913 - keywords only
    model: Model,
    target: CostTarget | str,
    options: PruneOptions | None = None,
    *,
    output: Path,
    data: TrainingData | None = None,
    judged: Dataset | None = None,
    observe: Observe = lambda progress: None,
) -> PruneResult:
    """Remove channels of a model until a target is met, and write what is left as an exported program.

    Channels of all layers are ranked together, those that the model can do without best go first, in multiples of
    ``round_to``; what they make of the other layers goes with them. Each step is followed by fine-tuning, with the
    original as the teacher. An interrupted pruning goes on where it was.

    Args:
        model: the original; it is left as it is.
        target: see :func:`onecard.training.cost.parse_target`.
        options: see :class:`onecard.training.prune_options.PruneOptions`.
        output: the ``.pt2`` file to write; a ``.json`` with the result's figures is written beside it.
        data: to fine-tune on, or None to only prune.
        judged: rows to judge by; without them, the last tenth of the training data.
        observe: called often, with what is going on.

    Returns:
        What was done; see :class:`onecard.training.prune_result.PruneResult`.

    Raises:
        UsageError: options, target or data do not fit together, or the target cannot be met.
        SearchError: the target was met, but the model is worse than ``max_drop`` allows.
        ModelError: nothing of the model can be pruned, or it cannot be traced, trained or exported.
        MissingDependencyError: torch-pruning is not installed.
        InterruptedSearch: Ctrl-C while fine-tuning; the state was kept.
        StorageError: the output or the state cannot be written.
    """
    started = time.monotonic()
    options = options or PruneOptions()
    options.check()
    target = parse_target(target) if isinstance(target, str) else target
    check_output(output)
    held = contextlib.ExitStack()
    try:
        job = _prepare(model, target, options, data, judged, observe)
        held.enter_context(in_use(job.folder.root))
        saved, module, choice, notes = _all_steps(job)
        first, last = saved[0], saved[-1]
        costs = job.cost(model.flat, "flops", "latency"), job.cost(module, "flops", "latency")
        yardstick = job.yardstick
        score = Score(yardstick.name, yardstick.rows, yardstick.original, last.step.score) if yardstick else None
        result = PruneResult(
            model=model.name,
            target=str(target),
            met=last.step.cost.of(target.measure) <= target.goal(first.before) * _margin(target),
            criterion=options.criterion,
            spec=model.spec,
            before=costs[0],
            after=costs[1],
            layers=describe_layers(model.flat, module),
            kept={display_name(name): reason for name, reason in choice.kept.items()},
            steps=tuple(s.step for s in saved),
            score=score,
            notes=notes,
            seconds=time.monotonic() - started,
        )
        job.tell(f"writing {output.name}", len(saved))
        result = write_result(result, module, output)
        job.folder.clear()
        return result
    finally:
        held.close()
        model.flat.cpu()


def _prepare(
    model: Model,
    target: CostTarget,
    options: PruneOptions,
    data: TrainingData | None,
    judged: Dataset | None,
    observe: Observe,
) -> _Job:
    """Check everything that needs no hours, in order of cheapness."""
    device = options.training.device
    if options.criterion == "taylor" and data is None:
        raise UsageError("the criterion taylor needs data to compute gradients on.", "Pass it with --train.")
    if data is not None and judged is None:
        data, judged = split_rows(data, _HELD_OUT)
    if judged is None and (options.metric or options.max_drop is not None):
        asked = f"--metric {options.metric}" if options.metric else "--max-drop"
        raise UsageError(f"{asked} needs rows to judge by.", "Pass them with --data, or training data with --train.")
    if options.metric and judged is not None and judged.labels is None:
        raise UsageError(f"--metric {options.metric} needs labels.", "Add an array 'label' to the rows.")
    flat = model.flat.to(device)
    probes = tuple(
        tuple(tensor.to(device) for tensor in sample_inputs(model.spec, sizes)) for sizes in probe_sizes(model.spec)
    )
    yardstick = make_yardstick(flat, model.spec, judged, options.metric, device) if judged is not None else None
    asked_for = replace(options, accept_closest=False, fresh=False, training=replace(options.training, device=""))
    digests = (data.digest if data else "", data.rows if data else 0, digest_of(judged) if judged else "")
    key = run_key(flat, model.spec, target, asked_for, *digests)
    folder = PruneFolder(cache_folder() / "training" / f"prune-{key[:16]}")
    if options.fresh:
        folder.clear()
    return _Job(model, target, options, data, yardstick, probes, folder, observe)


def _all_steps(job: _Job) -> tuple[list[Saved], FlatModule, Choice, tuple[str, ...]]:
    """Prune and fine-tune step by step, taking up what is there.

    Returns:
        The steps, the module that is left, what could be pruned, and notes.
    """
    job.tell("finding what can be pruned")
    flat = job.model.flat
    choice = find_groups(flat, job.probes, Limits(job.options.round_to, job.options.keep))
    saved = job.folder.read()
    before = saved[0].before if saved else job.cost(flat)
    goal, notes = _reachable(job, choice, before)
    module = job.folder.rebuild(flat, job.probes[0], saved)
    for step in range(len(saved) or 1, job.steps + 1):
        if step > len(saved):
            step_goal = before.of(job.target.measure) * (goal / before.of(job.target.measure)) ** (step / job.steps)
            all_there_is = bool(notes) and step == job.steps
            planned = PruneStep(step, step_goal, before, 0)
            saved.append(_prune_step(job, module, choice, before, planned, all_there_is=all_there_is))
            if step == 1 and job.data is not None:
                job.tell("trying the export", 1)
                check_exportable(module, job.model.spec)
            job.folder.save(saved[-1], module)
        if not saved[-1].tuned:
            saved[-1] = _tune_step(job, module, saved[-1])
            job.folder.save(saved[-1], module)
    _check_met(job, saved[-1], goal)
    saved, module = _within_drop(job, saved, module)
    return saved, module.cpu().eval().requires_grad_(False), choice, notes


def _reachable(job: _Job, choice: Choice, before: Cost) -> tuple[float, tuple[str, ...]]:
    """The goal of the last step: the target, or the closest to it if the user accepts that.

    Raises:
        UsageError: the target cannot be met, whatever is removed.
    """
    goal, measure = job.target.goal(before), job.target.measure
    job.tell("looking at how far pruning can go")
    least = job.cost(_without(job, job.model.flat, _everything(job, choice))).of(measure)
    if least <= goal:
        return goal, ()
    share = math.ceil(100 * _margin(job.target) * least / before.of(measure)) / 100
    found = (
        f"the target {job.target} cannot be met: with the fewest channels that may stay, {measure} is still "
        f"{show_amount(measure, least)} of {show_amount(measure, before.of(measure))}"
    )
    if not job.options.accept_closest:
        possible = f"Use --target {measure}={share:g}, or" if share < 1 else "Use"
        raise UsageError(f"{found}.", f"{possible} --accept-closest to have the closest, or a smaller --round-to.")
    return least, (found,)


def _margin(target: CostTarget) -> float:
    """What a figure may be above the target, since a time is never measured the same twice."""
    return _LATENCY_MARGIN if target.measure == "latency" else 1.0


def _check_met(job: _Job, last: Saved, goal: float) -> None:
    """Step by step, another mixture of layers may run out of channels than all at once.

    Raises:
        SearchError: the goal was missed, and the user does not accept the closest.
    """
    measure = job.target.measure
    reached, whole = last.step.cost.of(measure), last.before.of(measure)
    if reached <= goal * _margin(job.target) or job.options.accept_closest:
        return
    raise SearchError(
        f"the target {job.target} was missed: {measure} came down to {show_amount(measure, reached)} of "
        f"{show_amount(measure, whole)}.",
        f"Use --target {measure}={math.ceil(100 * reached / whole) / 100:g}, or --accept-closest to have this one.",
    )


def _everything(job: _Job, choice: Choice) -> Removal:
    return join(rank_blocks(trainable_copy(job.model.flat), job.probes[0], choice.groups, "magnitude"))


def _without(job: _Job, module: FlatModule, removal: Removal) -> FlatModule:
    pruned = trainable_copy(module)
    remove(pruned, job.probes[0], removal)
    return pruned


def _prune_step(
    job: _Job, module: FlatModule, choice: Choice, before: Cost, step: PruneStep, *, all_there_is: bool
) -> Saved:
    """Remove the fewest of the least important channels with which the step's goal is met, in place.

    A target that cannot be met is come closest to without any channel that may go: to look for the fewest would
    follow the noise of the clock where the target is a latency.
    """
    job.tell("ranking the channels", step.step)
    least = {g.root: math.ceil(g.channels * LEAST_SHARE) for g in choice.groups}
    limits = Limits(job.options.round_to, job.options.keep, least)
    module.eval()
    try:
        groups = [g for g in find_groups(module, job.probes, limits).groups if g.root in least]
    except ModelError:
        groups = []  # nothing is left that could go
    if job.options.criterion == "taylor" and job.data is not None:
        accumulate_gradients(module, job.data, job.options.training, job.model.spec)
    blocks = rank_blocks(module, job.probes[0], groups, job.options.criterion)
    module.zero_grad(set_to_none=True)

    def amount(count: int) -> float:
        job.tell(f"trying without {count} of {len(blocks)} blocks of channels", step.step)
        return job.cost(_without(job, module, join(blocks[:count]))).of(job.target.measure)

    count = len(blocks) if all_there_is else fewest(len(blocks), lambda count: amount(count) <= step.goal)
    removal = join(blocks[:count])
    remove(module, job.probes[0], removal)
    cost = job.cost(module)
    done = with_changes(step, cost=cost, channels=sum(map(len, removal.values())), score_before=_score(job, module))
    return Saved(before, done, removal, tuned=job.data is None or job.options.training.epochs == 0)


def fewest(most: int, enough: Callable[[int], bool]) -> int:
    """The smallest count up to ``most`` that is enough, by bisection; ``most`` if none is."""
    if enough(0):
        return 0
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _tune_step(job: _Job, module: FlatModule, saved: Saved) -> Saved:
    """Fine-tune what a step left, in place."""
    assert job.data is not None
    number, whole = saved.step.step, job.options.training.epochs
    options = replace(job.options.training, epochs=whole if number == job.steps else max(1, whole // 4))
    module.train()
    if job.data.batch_size(options.batch) < _STEADY_BATCH:
        for layer in module.modules():
            if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
                layer.eval()
    history: TrainHistory = fine_tune(
        module,
        job.model.flat,
        job.data,
        options,
        spec=job.model.spec,
        checkpoint=job.folder.training(number),
        observe=lambda train: job.tell("fine-tuning", number, train),
    )
    module.eval()
    job.folder.training(number).unlink(missing_ok=True)
    step = with_changes(saved.step, score=_score(job, module), epochs=history.epochs)
    return Saved(saved.before, step, saved.removal, tuned=True)


def _score(job: _Job, module: FlatModule) -> float | None:
    return job.yardstick.score(module) if job.yardstick is not None else None


def _within_drop(job: _Job, saved: list[Saved], module: FlatModule) -> tuple[list[Saved], FlatModule]:
    """The steps up to the last that is good enough.

    Raises:
        SearchError: that is not the last one, and the user does not accept less.
    """
    yardstick, allowed = job.yardstick, job.options.max_drop
    if yardstick is None or allowed is None:
        return saved, module
    good = [s for s in saved if s.step.score is not None and yardstick.original - s.step.score <= allowed]
    if good and good[-1] is saved[-1]:
        return saved, module
    last, measure = saved[-1].step, job.target.measure
    whole = saved[0].before.of(measure)
    message = (
        f"at {job.target} the {yardstick.name} is {last.score:.4g}, which is more than {allowed:g} below the "
        f"original's {yardstick.original:.4g}"
    )
    if not good:
        raise SearchError(f"{message}, and so it was at every step before.", "Ask for less, or train longer.")
    closest = good[-1].step
    share = math.ceil(100 * closest.cost.of(measure) / whole) / 100
    if not job.options.accept_closest:
        raise SearchError(
            f"{message}. Good enough was {measure}={share:g} with {closest.score:.4g}.",
            f"Use --target {measure}={share:g}, or --accept-closest to have that one, or train longer with --epochs.",
        )
    kept = saved[: closest.step]
    return kept, job.folder.rebuild(job.model.flat, job.probes[0], kept)

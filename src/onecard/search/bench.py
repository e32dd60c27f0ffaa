"""The bench of a candidate that compresses: its rows, and a judge that compares each trial with the original."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from onecard.calibration.bench import Bench, Judgement, Run
from onecard.evidence import Compression, OutputError
from onecard.models.flat import FlatModule, by_name
from onecard.recipe import Recipe
from onecard.search.job import Job, JobFolder
from onecard.transforms.precision import precision_scope
from onecard.verify.compare import Threshold, compare
from onecard.verify.data import Dataset, load_data
from onecard.verify.evaluate import answers_of, evaluate

_CALIBRATION_ROWS = 512
_JUDGED_ROWS = 64  # enough to tell a good scale from a bad one; a metric is measured on all rows
_HEADROOM = 0.85  # of the gate's relative error: it asks of a single row what these rows keep on average


def load_rows(folder: JobFolder, job: Job) -> Dataset | None:
    """The user's labelled rows, if there are any."""
    return load_data(str(folder.data), job.spec) if folder.data.exists() else None


def real_inputs(folder: JobFolder, job: Job) -> dict[str, Tensor] | None:
    """Real rows to verify and time with: the labelled ones, else those to calibrate on."""
    for path in (folder.data, folder.calibration):
        if path.exists():
            return load_data(str(path), job.spec).inputs
    return None


def make_bench(
    folder: JobFolder,
    recipe: Recipe,
    module: FlatModule,
    inputs: dict[str, Tensor],
    progress: Callable[[str], None],
    found: list[Compression],
) -> Bench:
    """A bench for one candidate.

    Args:
        folder: of the search.
        recipe: what is built.
        module: the original on the job's device; it is run now, before a transform changes it.
        inputs: example inputs on the device.
        progress: told what is going on.
        found: the list that its records are added to.
    """
    job = folder.read_job()
    data = load_rows(folder, job)
    rows = load_data(str(folder.calibration), job.spec) if folder.calibration.exists() else data
    return Bench(
        spec=job.spec,
        device=job.device,
        inputs=inputs,
        calibration=_first(rows, _CALIBRATION_ROWS).inputs if rows else None,
        judge=_make_judge(job, recipe, module, data, rows),
        alternatives=folder.alternatives if folder.alternatives.exists() else None,
        work=folder.candidate(recipe).root / "work",
        progress=progress,
        record=found.append,
    )


def _make_judge(
    job: Job, recipe: Recipe, module: FlatModule, data: Dataset | None, rows: Dataset | None
) -> Callable[[Run], Judgement] | None:
    """Compare with the original's answers, and by the metric where there are labels."""
    judged = data if data is not None and job.metric else rows
    if judged is None:
        return None
    judged = judged if job.metric and data is not None else _first(judged, _JUDGED_ROWS)
    threshold = job.thresholds[recipe.tolerance]

    def original(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.inference_mode(), precision_scope("fp32"):
            return by_name(module, job.spec, inputs)

    wanted = answers_of(original, job.spec, judged, job.device)
    best = evaluate(wanted, judged, job.metric) if job.metric and data is not None else None

    def judge(run: Run) -> Judgement:
        with torch.inference_mode():
            answers = answers_of(run, job.spec, judged, job.device)
        errors = [compare(name, answers[name], ref, "judged rows") for name, ref in wanted.items()]
        error = max(e.relative_l2 for e in errors)
        if best is None:
            return Judgement(error, None, _within(errors, threshold))
        value = evaluate(answers, judged, job.metric)
        return Judgement(error, value, best - value <= job.max_drop)

    return judge


def _within(errors: list[OutputError], threshold: Threshold) -> bool:
    return all(e.relative_l2 <= _HEADROOM * threshold.relative_l2 and e.cosine >= threshold.cosine for e in errors)


def _first(rows: Dataset, count: int) -> Dataset:
    """The first rows, without their labels."""
    return Dataset({name: t[:count] for name, t in rows.inputs.items()}, None, min(count, rows.rows))

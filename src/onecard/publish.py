"""From a finished search to a bundle: which variants ship, the golden answers, the evidence and its page."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from onecard import __version__
from onecard.bundle.files import describe
from onecard.bundle.manifest import (
    EVIDENCE,
    FORMAT_VERSION,
    GOLDEN,
    MANIFEST,
    REPORT,
    SOURCE,
    VARIANTS,
    Manifest,
    VariantEntry,
    encode_manifest,
)
from onecard.bundle.write import new_bundle
from onecard.errors import StorageError
from onecard.evidence import INCOMPARABLE, Candidate, Evidence, Measurement, Timing, to_json
from onecard.inputs import make_inputs
from onecard.recipe import ORIGINAL
from onecard.report.html import render
from onecard.search.bench import real_inputs
from onecard.search.job import Job, JobFolder
from onecard.verify.cases import Case
from onecard.verify.compare import Threshold, threshold_of
from onecard.verify.reference import read_answers, read_reference

_LIVE_PICKLE = "live.pkl"
_ROOM = 1.2  # of an error that was seen: another machine rounds otherwise


def publish(out: Path, evidence: Evidence, folder: JobFolder) -> Path:
    """Write a bundle from a finished search.

    Args:
        out: the folder to make; an older bundle there is replaced, anything else is left alone.
        evidence: the outcome of the search.
        folder: the search's folder: the original, its answers and the candidates' artifacts.

    Returns:
        ``out``, absolute.

    Raises:
        StorageError: the folder cannot be written, the disk is full, or something else lies there.
    """
    out = out.absolute()
    with new_bundle(out) as aside:
        kept = kept_variants(evidence)
        shutil.copytree(folder.source, aside / SOURCE, ignore=shutil.ignore_patterns(_LIVE_PICKLE))
        for candidate in kept:
            shutil.copytree(folder.candidate(candidate.recipe).variant, aside / VARIANTS / candidate.id)
        job = folder.read_job()
        case = _write_golden(folder, job, aside / GOLDEN)
        (aside / EVIDENCE).write_bytes(to_json(evidence))
        (aside / REPORT).write_text(render(evidence, out.name), encoding="utf-8")
        manifest = _manifest(aside, evidence, kept, job.thresholds, case)
        (aside / MANIFEST).write_bytes(encode_manifest(manifest))
    return out


def kept_variants(evidence: Evidence) -> list[Candidate]:
    """The variants worth their room: each bucket's best, the best of another engine, and the original."""
    names: list[str] = [evidence.chosen]
    names += [rank.variants[0] for rank in evidence.ranks if rank.variants]
    engine = next((c.recipe.backend for c in evidence.candidates if c.id == evidence.chosen), "")
    for rank in evidence.ranks[:1]:
        others = (evidence.candidate(v) for v in rank.variants if v != ORIGINAL.id)
        names += [c.id for c in others if c is not None and c.recipe.backend != engine][:1]
    names.append(ORIGINAL.id)
    found = (evidence.candidate(name) for name in dict.fromkeys(names))
    return [c for c in found if c is not None]


def _write_golden(folder: JobFolder, job: Job, path: Path) -> Case:
    """The smallest case whose answers are whole: its inputs and the original's answers."""
    reference = read_reference(folder.reference)
    data = real_inputs(folder, job)
    for case in reference.cases:
        answers, rows = read_answers(folder.reference, case)
        if rows is None:
            inputs = make_inputs(job.spec, case.bucket, seed=case.seed, ragged=case.ragged, data=data)
            named = {f"in.{k}": v for k, v in inputs.items()} | {f"out.{k}": v for k, v in answers.items()}
            save_file({name: tensor.contiguous() for name, tensor in named.items()}, path)
            return case
    raise StorageError("the original's answers are too large for a self-test.", "Optimise for smaller sizes too.")


def _manifest(
    folder: Path, evidence: Evidence, kept: Sequence[Candidate], thresholds: dict[str, Threshold], case: Case
) -> Manifest:
    ids = {c.id for c in kept}
    ranks = tuple(
        type(rank)(rank.bucket, tuple(v for v in rank.variants if v in ids), rank.speedup, rank.noise)
        for rank in evidence.ranks
    )
    variants = tuple(
        VariantEntry(
            c.recipe,
            _allowed(c, thresholds),
            _summary(c, evidence),
            needs_source=_needs_source(folder / VARIANTS / c.id),
        )
        for c in kept
    )
    files = {p.relative_to(folder).as_posix(): describe(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    return Manifest(
        "",
        FORMAT_VERSION,
        __version__,
        evidence.model,
        evidence.spec,
        evidence.buckets,
        evidence.objective,
        evidence.chosen,
        ranks,
        variants,
        evidence.environment,
        case,
        files,
    )


def _allowed(candidate: Candidate, thresholds: dict[str, Threshold]) -> Threshold:
    """What a variant's answers are held to wherever it is loaded: no less than what it was passed with.

    A task's metric may pass one whose answers differ by more than its precision explains.
    """
    threshold = thresholds[candidate.recipe.tolerance]
    errors = [error for error in candidate.errors if error.relative_l2 < INCOMPARABLE]
    if candidate.metric is None or not errors:
        return threshold
    error = _ROOM * max(each.relative_l2 for each in errors)
    return threshold if error <= threshold.relative_l2 else threshold_of(error)


def _summary(candidate: Candidate, evidence: Evidence) -> Measurement:
    """The measurement without its raw samples, which stand in ``evidence.json``: just the median of each.

    The median is the play-off's where the variant took part, for the ranks are: else the first of them might look
    slower than the second. In the play-off nothing is called for the first time.
    """
    measurement = candidate.measurement
    timings = tuple(
        Timing(own.bucket, (round(ranked.median_ms, 5),), (), (), own.rows, own.first_call_ms)
        for own in measurement.timings
        if (ranked := evidence.timing(candidate.id, own.bucket)) is not None
    )
    return Measurement(
        timings,
        measurement.build_s,
        measurement.load_s,
        measurement.peak_device_bytes,
        measurement.peak_process_bytes,
        measurement.size_bytes,
    )


def _needs_source(variant: Path) -> bool:
    return any(b'"source"' in note.read_bytes() for note in variant.rglob("eager.json"))

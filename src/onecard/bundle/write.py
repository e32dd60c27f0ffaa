"""Writing a bundle: aside first, then renamed into place, so that there is always a whole one or none."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
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
from onecard.errors import StorageError
from onecard.evidence import Candidate, Evidence, Measurement, Timing, to_json
from onecard.recipe import ORIGINAL
from onecard.verify.cases import Case
from onecard.verify.compare import Threshold
from onecard.verify.inputs import make_inputs

_LIVE_PICKLE = "live.pkl"
GOLDEN_SEED = 20_000


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


def write_bundle(
    out: Path,
    evidence: Evidence,
    job: Path,
    thresholds: dict[str, Threshold],
    golden: tuple[Case, dict[str, torch.Tensor]],
) -> Path:
    """Write a bundle.

    Args:
        out: the folder to make; an older bundle there is replaced, anything else is left alone.
        evidence: the outcome of the search.
        job: the search's folder with ``source/`` and ``candidates/<recipe>/variant/``.
        thresholds: by precision, kept for the self-test.
        golden: the case of the self-test and the original's answers to it.

    Returns:
        ``out``, absolute.

    Raises:
        StorageError: the folder cannot be written, the disk is full, or something else lies there.
    """
    out = out.absolute()
    check_writable(out)
    aside = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    with _cleaned_up(aside, out):
        kept = kept_variants(evidence)
        aside.mkdir(parents=True)
        shutil.copytree(job / SOURCE, aside / SOURCE, ignore=shutil.ignore_patterns(_LIVE_PICKLE))
        for candidate in kept:
            shutil.copytree(job / "candidates" / candidate.id / "variant", aside / VARIANTS / candidate.id)
        case, answers = golden
        inputs = make_inputs(evidence.spec, case.bucket, seed=case.seed)
        named = {f"in.{k}": v for k, v in inputs.items()} | {f"out.{k}": v for k, v in answers.items()}
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}, aside / GOLDEN)
        (aside / EVIDENCE).write_bytes(to_json(evidence))
        from onecard.report.html import write_report

        write_report(evidence, aside / REPORT)
        manifest = _manifest(aside, evidence, kept, thresholds, case)
        (aside / MANIFEST).write_bytes(encode_manifest(manifest))
        _sync(aside)
        _replace(aside, out)
    return out


def check_writable(out: Path) -> None:
    """Find out before hours of work whether a bundle could be written there.

    Raises:
        StorageError: the folder above cannot be written, or something that is no bundle is in the way.
    """
    out = out.absolute()
    if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise StorageError(f"{out} exists and is no onecard bundle.", "Choose another output with -o, or remove it.")
    with _cleaned_up(None, out):
        out.parent.mkdir(parents=True, exist_ok=True)
        probe = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.probe")
        probe.mkdir()
        probe.rmdir()


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
            thresholds[c.recipe.precision],
            _summary(c.measurement),
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


def _summary(measurement: Measurement) -> Measurement:
    """The measurement without its raw samples, which stand in ``evidence.json``: just the median of each."""
    timings = tuple(
        Timing(t.bucket, (round(t.median_ms, 5),), (), (), t.rows, t.first_call_ms) for t in measurement.timings
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


def _replace(aside: Path, out: Path) -> None:
    """Rename the new bundle into place; an older one moves out of the way first and is then removed."""
    if not out.exists():
        aside.rename(out)
        return
    old = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.old")
    out.rename(old)
    try:
        aside.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Ask the disk to have every file before the rename makes them the bundle."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


@contextlib.contextmanager
def _cleaned_up(aside: Path | None, out: Path) -> Iterator[None]:
    """Remove the half-written folder whatever happens, and say in one sentence what the disk refused."""
    try:
        yield
    except OSError as error:
        raise StorageError(_explain(error, out), "Free some space or choose another folder with -o.") from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def _explain(error: OSError, out: Path) -> str:
    if error.errno == errno.ENOSPC:
        return f"the disk is full: the bundle {out} was not written."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{out.parent} cannot be written ({error.strerror}): the bundle {out.name} was not written."
    return f"the bundle {out} was not written: {error.strerror or error}."

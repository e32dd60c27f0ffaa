"""The fp32 original of a bundle, which answers a request again and says how far the answer given was from its own."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from safetensors.torch import load, load_file, save
from torch import Tensor

from onecard.bundle.evidence_file import read_evidence
from onecard.bundle.files import damaged
from onecard.bundle.manifest import GOLDEN, SOURCE, Manifest, VariantEntry, read_manifest
from onecard.bundle.variant import Site, VariantRunner, load_variant
from onecard.errors import BundleError
from onecard.evidence import INCOMPARABLE
from onecard.models.wording import first_line
from onecard.recipe import ORIGINAL
from onecard.runtime.slots import Array, as_tensor
from onecard.verify.compare import Threshold, compare
from onecard.verify.judge import Rule, problem

_IN, _OUT = "in.", "out."


class Comparison(msgspec.Struct, frozen=True):
    """An answer that was given, beside the original's.

    Args:
        difference: the largest relative error of its outputs, ``INCOMPARABLE`` where they cannot be compared.
        wrong: what is wrong with it; empty if it is right.
        busy_s: what it took: seconds of processor time, or of the clock on a card.
        failure: why there is nothing to compare with; then the rest says nothing.
    """

    difference: float = 0.0
    wrong: str = ""
    busy_s: float = 0.0
    failure: str = ""


class Original:
    """The original, loaded and proved.

    Args:
        folder: of the bundle.
        digest: of its manifest, as it was when it was opened to serve.
        device: where the original is to run.

    Raises:
        BundleError: it cannot be loaded, it does not give its own golden answers here, or another bundle lies there.
    """

    def __init__(self, folder: Path, digest: str, device: str) -> None:
        self._manifest = read_manifest(folder)
        if self._manifest.sha256 != digest:
            raise BundleError(f"{folder} holds another bundle than the one that serves.", "Load the model again.")
        self._device = device
        self._metrics = _judged_by_metric(folder)
        entry = self._manifest.variant(ORIGINAL.id)
        if entry is None:
            raise BundleError(f"{folder} does not hold its original as a variant.", "Make the bundle anew.")
        self._run = _load(folder, self._manifest, entry, device)
        self._prove(folder, entry)

    def compare(
        self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], variants: Sequence[str]
    ) -> Comparison:
        """Answer a request, alone and without padding, and judge the answer that was given by the gate's rule.

        Args:
            inputs: of the request, on the host.
            outputs: what it was answered, likewise.
            variants: recipes that may have answered it: the one that is held to least counts.

        Raises:
            Exception: whatever the original raises.
        """
        return self._compare(inputs, outputs, self._rule(variants))

    def close(self) -> None:
        """Release it."""
        self._run.close()

    def _compare(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], rule: Rule) -> Comparison:
        clock = time.process_time if self._device == "cpu" else time.perf_counter
        began = clock()
        answers = self._run({name: tensor.to(self._device) for name, tensor in inputs.items()})
        difference, wrongs = 0.0, []
        for name, answer in answers.items():
            out, ref = outputs.get(name), answer.cpu()
            if out is None:
                difference = INCOMPARABLE
                wrongs.append(f"there is no output '{name}'")
                continue
            error = compare(name, out, ref, "request")
            difference = max(difference, error.relative_l2)
            wrongs.append(problem(out, ref, error, rule, f"output '{name}'"))
        return Comparison(difference, "; ".join(filter(None, wrongs)), clock() - began)

    def _rule(self, variants: Sequence[str]) -> Rule:
        entries = [entry for name in variants if (entry := self._manifest.variant(name)) is not None]
        limits = [entry.threshold for entry in entries or self._manifest.variants]
        loosest = Threshold(max(limit.relative_l2 for limit in limits), min(limit.cosine for limit in limits))
        only_sane = any(entry.recipe.id in self._metrics for entry in entries)
        return Rule(loosest, self._manifest.spec.batch_symbol is not None, only_sane)

    def _prove(self, folder: Path, entry: VariantEntry) -> None:
        """Have it answer the golden inputs: with other software, or elsewhere, it may not be the original any more."""
        golden = load_file(folder / GOLDEN)
        rule = Rule(entry.threshold, self._manifest.spec.batch_symbol is not None)
        wrong = self._compare(_under(_IN, golden), _under(_OUT, golden), rule).wrong
        if wrong:
            raise BundleError(
                f"the original of {folder} does not give its golden answer on {self._device}: {wrong}.",
                "Make the bundle anew on this machine.",
            )


class _Question(msgspec.Struct, frozen=True):
    """A request and its answer on their way to another process: safetensors, and who may have answered."""

    variants: list[str]
    tensors: bytes


def pack_question(inputs: Mapping[str, Array], outputs: Mapping[str, Array], variants: Sequence[str]) -> bytes:
    """What :meth:`Original.compare` takes, as bytes for another process."""
    named = {f"{_IN}{name}": value for name, value in inputs.items()}
    named |= {f"{_OUT}{name}": value for name, value in outputs.items()}
    tensors = save({name: as_tensor(value).contiguous() for name, value in named.items()})
    return msgspec.msgpack.encode(_Question(list(variants), tensors))


def unpack_question(data: bytes) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Inputs, outputs and variants from what :func:`pack_question` wrote."""
    question = msgspec.msgpack.decode(data, type=_Question)
    tensors = load(question.tensors)
    return _under(_IN, tensors), _under(_OUT, tensors), question.variants


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _load(folder: Path, manifest: Manifest, entry: VariantEntry, device: str) -> VariantRunner:
    roots = (f"{SOURCE}/", f"{entry.folder}/")
    broken = damaged(folder, [(name, file) for name, file in manifest.files.items() if name.startswith(roots)])
    for name, what in broken.items():
        raise BundleError(f"{folder / name} {what}.", "Copy the bundle again or make it anew.")
    try:
        site = Site(manifest.spec, manifest.buckets, device, folder / SOURCE)
        return load_variant(folder / entry.folder, entry.recipe, site)
    except Exception as error:  # an original is somebody's code: it may fail in any way
        raise BundleError(f"the original of {folder} cannot be loaded on {device}: {first_line(error)}.") from error


def _judged_by_metric(folder: Path) -> frozenset[str]:
    """Variants that a task's metric let pass; none where the evidence cannot be read: then tolerances hold."""
    try:
        evidence = read_evidence(folder)
    except BundleError:
        return frozenset()
    return frozenset(candidate.id for candidate in evidence.candidates if candidate.metric is not None)

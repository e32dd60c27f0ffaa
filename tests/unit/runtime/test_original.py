"""A bundle's original as its own process asks it: by which rule it judges, and when it is of no use."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from onecard.bundle.files import describe
from onecard.bundle.manifest import EVIDENCE, MANIFEST, encode_manifest, read_manifest
from onecard.errors import BundleError, EngineClosedError, EngineError
from onecard.evidence import INCOMPARABLE, Evidence, Metric, to_json
from onecard.runtime.original import Original, pack_question, unpack_question
from onecard.runtime.original_client import OriginalClient
from onecard.verify.compare import Threshold
from tests.services.running_server import GOLDEN
from tests.unit.runtime.hastened_originals import hastened

pytestmark = pytest.mark.timeout(300)
VARIANT = "onnxruntime.cpu"


@pytest.fixture
def hasten():
    with hastened():
        yield


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def golden():
    tensors = load_file(GOLDEN / "golden.safetensors")
    return {"image": tensors["in.image"]}, {"output": tensors["out.output"]}


def original_of(bundle: Path) -> Original:
    return Original(bundle, read_manifest(bundle).sha256, "cpu")


def change(bundle: Path, **fields: object) -> None:
    """Write the manifest anew, with the files as they are now."""
    manifest = read_manifest(bundle)
    files = {name: describe(bundle / name) for name in manifest.files}
    changed = msgspec.structs.replace(manifest, files=files, **fields)
    (bundle / MANIFEST).write_bytes(encode_manifest(changed))


def loosen(bundle: Path, relative_l2: float) -> None:
    """Hold the variant, but not the original, to another tolerance."""
    entries = [
        msgspec.structs.replace(entry, threshold=Threshold(relative_l2, 0.5)) if entry.recipe.id == VARIANT else entry
        for entry in read_manifest(bundle).variants
    ]
    change(bundle, variants=tuple(entries))


def test_an_answer_is_held_to_the_tolerance_of_the_variant_that_gave_it(bundle, golden):
    inputs, outputs = golden
    off = {"output": outputs["output"] * 1.05}
    strict = original_of(bundle).compare(inputs, off, [VARIANT])
    assert strict.difference == pytest.approx(0.05, rel=1e-3)
    assert strict.wrong == "output 'output': relative error 5.00e-02 exceeds 1e-03"
    loosen(bundle, 0.2)
    original = original_of(bundle)
    assert not original.compare(inputs, off, [VARIANT]).wrong
    assert not original.compare(inputs, off, ["eager", VARIANT]).wrong, "either may have answered"
    assert original.compare(inputs, off, ["eager"]).wrong


def test_where_a_metric_let_a_variant_pass_its_answers_need_only_be_sane(bundle, golden):
    inputs, outputs = golden
    evidence = msgspec.json.decode((bundle / EVIDENCE).read_bytes(), type=Evidence)
    candidates = tuple(msgspec.structs.replace(c, metric=Metric("top1", 0.9, 0.9, 8)) for c in evidence.candidates)
    (bundle / EVIDENCE).write_bytes(to_json(msgspec.structs.replace(evidence, candidates=candidates)))
    change(bundle)
    original = original_of(bundle)
    far = original.compare(inputs, {"output": outputs["output"] + 1}, [VARIANT])
    assert far.difference > 0.1 and not far.wrong
    infinite = original.compare(inputs, {"output": outputs["output"] / 0}, [VARIANT])
    assert infinite.difference == INCOMPARABLE and "NaN or infinity" in infinite.wrong


def test_an_answer_that_lacks_an_output_is_wrong(bundle, golden):
    told = original_of(bundle).compare(golden[0], {}, [VARIANT])
    assert (told.difference, told.wrong) == (INCOMPARABLE, "there is no output 'output'")


def test_infinity_in_and_infinity_out_is_no_fault(bundle, golden):
    inputs, _ = golden
    image = {"image": torch.full_like(inputs["image"], float("nan"))}
    told = original_of(bundle).compare(image, {"output": torch.full((1, 10), float("nan"))}, [VARIANT])
    assert not told.wrong


def test_an_original_that_is_another_one_is_refused(bundle):
    served = read_manifest(bundle).sha256
    change(bundle, name="other")
    with pytest.raises(BundleError, match="another bundle than the one that serves"):
        Original(bundle, served, "cpu")


def test_a_damaged_original_is_refused_before_its_code_runs(bundle):
    (bundle / "source" / "factory.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(BundleError, match=r"factory\.py"):
        original_of(bundle)


def test_an_original_that_does_not_load_says_why(bundle):
    (bundle / "source" / "weights.safetensors").write_bytes(b"no weights")
    change(bundle)
    with pytest.raises(BundleError, match=r"the original of .* cannot be loaded on cpu: \w+: .*weights\.safetensors"):
        original_of(bundle)


def test_an_original_that_does_not_give_its_golden_answer_is_no_judge(bundle):
    tensors = load_file(bundle / "golden.safetensors")
    save_file({**tensors, "out.output": tensors["out.output"] + 1}, bundle / "golden.safetensors")
    with pytest.raises(BundleError, match="does not give its golden answer on cpu: output 'output'"):
        original_of(bundle)


def test_a_question_arrives_as_it_was_asked():
    inputs = {"a": torch.arange(6).reshape(2, 3).t(), "b": torch.ones(2, dtype=torch.bfloat16)}
    outputs = {"a": torch.zeros(0, 4).numpy(), "c": torch.tensor(True)}
    got_in, got_out, variants = unpack_question(pack_question(inputs, outputs, ["x", "y"]))
    assert variants == ["x", "y"] and got_in.keys() == inputs.keys() and got_out.keys() == outputs.keys()
    assert torch.equal(got_in["a"], inputs["a"]) and torch.equal(got_in["b"], inputs["b"])
    assert got_out["a"].shape == (0, 4) and got_out["c"].item() is True


def test_the_process_tells_what_the_original_raises_and_why_it_does_not_load(bundle, golden, hasten):
    inputs, outputs = golden
    client = OriginalClient(bundle, read_manifest(bundle).sha256, "cpu")
    try:
        with pytest.raises(EngineError, match="no answer to this request: RuntimeError"):
            client.compare({"image": inputs["image"].reshape(-1)}, outputs, [VARIANT])
        assert client.compare(inputs, outputs, [VARIANT]).wrong == ""
    finally:
        client.close()
        client.release()
    other = OriginalClient(bundle, "0" * 64, "cpu")
    with pytest.raises(BundleError, match="another bundle than the one that serves"):
        other.compare(inputs, outputs, [VARIANT])
    other.release()


def test_a_client_that_is_closed_while_it_waits_comes_back(golden, hasten):
    client = OriginalClient(GOLDEN, read_manifest(GOLDEN).sha256, "cpu")
    closing = threading.Timer(0.3, client.close)  # it is still importing
    closing.start()
    with pytest.raises(EngineClosedError):
        while True:
            client.compare(*golden, [VARIANT])
    with pytest.raises(EngineClosedError):
        client.compare(*golden, [VARIANT])
    client.release()

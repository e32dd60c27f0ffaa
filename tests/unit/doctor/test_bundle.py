"""The doctor and a bundle: what serves each size here, and why another does not; and the command itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from onecard.bundle.files import describe
from onecard.bundle.manifest import MANIFEST, Manifest, encode_manifest, read_manifest
from onecard.cli import main
from onecard.doctor import Finding
from onecard.doctor.check_bundle import NEEDED, bundle_device, check_bundle
from onecard.spec import bucket_label
from tests.conftest import INPUT, MODEL_FILE
from tests.ranked import rank_first

pytestmark = pytest.mark.timeout(600)
BEST = "onnxruntime.cpu"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    (folder / "zoo.py").write_text(MODEL_FILE)
    command = [sys.executable, "-c", "from onecard.cli import main; main()", "optimize", f"{folder / 'zoo.py'}:small"]
    options = ["--input", INPUT, "--recipe", BEST, "--device", "cpu", "-o", str(folder / "small.onecard")]
    environment = {**os.environ, "ONECARD_CACHE": str(folder / "cache")}
    subprocess.run([*command, *options], env=environment, capture_output=True, check=True, timeout=500)
    return rank_first(folder / "small.onecard", BEST)


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(made, tmp_path / "small.onecard"))


def rewrite(bundle: Path, change: Callable[[Manifest], Manifest]) -> None:
    """Another manifest, with the digests of the files as they are now."""
    manifest = change(read_manifest(bundle))
    files = {name: describe(bundle / name) for name in manifest.files}
    (bundle / MANIFEST).write_bytes(encode_manifest(msgspec.structs.replace(manifest, files=files)))


def of(findings: list[Finding], area: str) -> list[Finding]:
    return [finding for finding in findings if finding.area == area]


def model_file(bundle: Path) -> Path:
    return next((bundle / "variants" / BEST).rglob("*.onnx"))


def test_a_sound_bundle(bundle: Path) -> None:
    found = check_bundle(bundle, "cpu")
    assert {finding.level for finding in found} == {"ok"}
    sizes = [finding for finding in found if finding.area != "bundle"]
    assert [finding.area for finding in sizes] == [bucket_label(bucket) for bucket in read_manifest(bundle).buckets]
    assert all(BEST in finding.what or "eager" in finding.what for finding in sizes)
    assert all("without --load" in finding.what for finding in sizes)


def test_loading_proves_it(bundle: Path) -> None:
    found = check_bundle(bundle, "cpu", load=True)
    assert {finding.level for finding in found} == {"ok"}
    assert [finding for finding in found if "loads and answers rightly" in finding.what]


def test_a_damaged_variant_is_passed_over(bundle: Path) -> None:
    model_file(bundle).write_bytes(b"not a model")
    found = check_bundle(bundle, "cpu")
    for rank in read_manifest(bundle).ranks:
        [served] = of(found, bucket_label(rank.bucket))
        assert served.what.startswith("eager")
        assert served.level == "warning"
        assert "bytes, expected" in served.what and "Copy the bundle again" in served.cure


def test_only_loading_finds_a_variant_that_does_not_load(bundle: Path) -> None:
    model_file(bundle).write_bytes(b"not a model")
    rewrite(bundle, lambda manifest: manifest)
    assert not [finding for finding in check_bundle(bundle, "cpu") if finding.level != "ok"]
    loaded = [finding for finding in check_bundle(bundle, "cpu", load=True) if finding.level == "warning"]
    assert loaded
    assert all("it does not load" in finding.what for finding in loaded)


def test_a_package_that_is_not_there(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NEEDED, "onnxruntime", ("there_is_no_such_module", "onnxruntime"))
    warned = [finding for finding in check_bundle(bundle, "cpu") if finding.level == "warning"]
    assert warned
    assert all("there_is_no_such_module is not installed" in finding.what for finding in warned)
    assert all(finding.cure == "pip install 'onecard[onnxruntime]'" for finding in warned)


def test_a_bundle_for_a_card(bundle: Path) -> None:
    def for_a_card(manifest: Manifest) -> Manifest:
        there = msgspec.structs.replace(manifest.environment, device="cuda:0", versions={"torch": "2.11.0"})
        return msgspec.structs.replace(manifest, environment=there)

    rewrite(bundle, for_a_card)
    found = check_bundle(bundle, "cpu")
    [note] = [finding for finding in of(found, "bundle") if finding.level == "note"]
    assert "torch 2.11.0 →" in note.what
    assert "it was made for cuda, not for cpu" in next(f for f in found if f.level == "warning").what


def test_nothing_runs(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def alone(manifest: Manifest) -> Manifest:
        variants = tuple(v for v in manifest.variants if v.recipe.id == BEST)
        ranks = tuple(msgspec.structs.replace(rank, variants=(BEST,)) for rank in manifest.ranks)
        return msgspec.structs.replace(manifest, variants=variants, ranks=ranks, chosen=BEST)

    shutil.rmtree(bundle / "variants" / "eager", ignore_errors=True)
    monkeypatch.setitem(NEEDED, "onnxruntime", ("there_is_no_such_module", "onnxruntime"))
    manifest = read_manifest(bundle)
    kept = {name: entry for name, entry in manifest.files.items() if not name.startswith("variants/eager")}
    rewrite(bundle, lambda m: alone(msgspec.structs.replace(m, files=kept)))
    errors = [finding for finding in check_bundle(bundle, "cpu") if finding.level == "error"]
    assert len(errors) == len(manifest.buckets)
    assert all("no variant runs on cpu" in error.what for error in errors)


def test_golden_answers_that_are_gone(bundle: Path) -> None:
    (bundle / "golden.safetensors").unlink()
    [error] = check_bundle(bundle, "cpu")
    assert (error.level, error.area) == ("error", "bundle")
    assert "cannot prove itself" in error.what and error.cure


def test_a_report_that_was_changed_is_told(bundle: Path) -> None:
    (bundle / "report.html").write_text("")
    warned = [finding for finding in of(check_bundle(bundle, "cpu"), "bundle") if finding.level == "warning"]
    assert ["report.html" in finding.what for finding in warned] == [True]


def test_what_is_no_bundle(tmp_path: Path) -> None:
    [error] = check_bundle(tmp_path, "cpu")
    assert error.level == "error"
    assert "no onecard bundle" in error.what
    assert bundle_device(tmp_path, "auto") == "auto"


def onecard(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["onecard", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_command(bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code = onecard(monkeypatch, "doctor", str(bundle), "--device", "cpu")
    printed = capsys.readouterr().out
    assert code in (0, 1)
    assert "torch" in printed and "serves, as far as can be seen" in printed
    assert printed.rstrip().splitlines()[-1].endswith(".")


def test_the_command_in_json(bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code = onecard(monkeypatch, "doctor", str(bundle), "--json")
    told = json.loads(capsys.readouterr().out)
    levels = {finding["level"] for finding in told["findings"]}
    assert code == int("error" in levels)
    assert told["facts"]["device"] == "cpu"  # where the bundle was made for
    assert {"area", "level", "what", "why", "cure"} == set(told["findings"][0])


def test_the_commands_exit_code(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert onecard(monkeypatch, "doctor", str(tmp_path), "--device", "cpu") == 1
    assert "no onecard bundle" in capsys.readouterr().out
    (bundle / "report.html").write_text("")
    assert onecard(monkeypatch, "doctor", str(bundle), "--device", "cpu", "--strict") == 1
    capsys.readouterr()
    assert onecard(monkeypatch, "doctor", "--load") == 2
    assert "onecard doctor BUNDLE --load" in capsys.readouterr().err

"""Every file of a bundle damaged in turn: the load names it, and falls back or refuses; no pickle ever runs."""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

import onecard
from onecard.bundle.open import OnecardWarning
from onecard.errors import BundleError, NoVariantError
from onecard.search.job import EffortSpec
from tests.conftest import INPUT, MODEL_FILE
from tests.ranked import rank_first
from tests.services.running_server import golden_of_here

RECIPES = ("torchscript.trace",)
DAMAGES = ("flip", "truncate", "remove")


@pytest.fixture(scope="module", params=["golden", "fresh"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real bundle: an old one with ONNX Runtime's files, or a new one with TorchScript's; both have the original."""
    if request.param == "golden":
        return golden_of_here()
    folder = tmp_path_factory.mktemp("bundle")
    (folder / "zoo.py").write_text(MODEL_FILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONECARD_CACHE", str(folder / "cache"))
        onecard.optimize(
            f"{folder / 'zoo.py'}:small",
            inputs=[INPUT],
            output=folder / "small.onecard",
            device="cpu",
            recipes=RECIPES,
            effort=EffortSpec(0.1, 0.2, 0.1, 3),
        ).close()
    return rank_first(folder / "small.onecard", RECIPES[0])


def _files(bundle: Path) -> list[str]:
    return sorted(p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file())


def _damage(path: Path, how: str) -> None:
    if how == "remove":
        path.unlink()
    elif how == "truncate":
        path.write_bytes(path.read_bytes()[: max(0, path.stat().st_size // 2)])
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0x01
        path.write_bytes(bytes(data))


@pytest.mark.parametrize("how", DAMAGES)
def test_each_damaged_file_is_named(bundle: Path, tmp_path: Path, how: str) -> None:
    picture = np.random.default_rng(0).standard_normal((2, 3, 16, 16), dtype=np.float32)
    right = onecard.load(bundle)(image=picture)["output"]
    outcomes = {}
    for name in _files(bundle):
        copy = tmp_path / "copy.onecard"
        shutil.copytree(bundle, copy)
        _damage(copy / name, how)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", OnecardWarning)
            try:
                loaded = onecard.load(copy)
            except (BundleError, NoVariantError) as error:
                outcomes[name] = "refused"
                assert Path(name).name in str(error), (name, str(error))
            else:
                outcomes[name] = "served"
                np.testing.assert_allclose(loaded(image=picture)["output"], right, rtol=1e-3, atol=1e-4)
                said = [str(w.message) for w in caught] + list(loaded.skipped.values())
                assert any(Path(name).name in text for text in said), (name, said)
        shutil.rmtree(copy)
    assert outcomes["onecard.json"] == "refused"
    assert outcomes["golden.safetensors"] == "refused"
    assert all(outcome == "served" for name, outcome in outcomes.items() if name.startswith("variants/")), outcomes


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_in_place_of_any_file_is_never_run(bundle: Path, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    bomb = pickle.dumps(_Bomb(mark))
    for check_files in (True, False):  # also where the digests are not looked at
        for name in _files(bundle):
            copy = tmp_path / "copy.onecard"
            shutil.copytree(bundle, copy)
            (copy / name).write_bytes(bomb)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", OnecardWarning)
                try:
                    from onecard.bundle.open import load_bundle

                    load_bundle(copy, check_files=check_files)
                except (BundleError, NoVariantError):
                    pass
            assert not mark.exists(), name
            shutil.rmtree(copy)


def test_a_newer_format_is_refused_with_the_cure(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.onecard"
    shutil.copytree(bundle, copy)
    text = (copy / "onecard.json").read_text().replace('"format_version": 1', '"format_version": 2', 1)
    (copy / "onecard.json").write_text(text)
    with pytest.raises(BundleError, match="format version 2") as caught:
        onecard.load(copy)
    assert "pip install -U onecard" in caught.value.cure


def test_a_manifest_that_leaves_its_folder_is_refused(bundle: Path, tmp_path: Path) -> None:
    from onecard.bundle.manifest import encode_manifest, read_manifest

    copy = tmp_path / "copy.onecard"
    shutil.copytree(bundle, copy)
    manifest = read_manifest(copy)
    manifest.files["../../etc/passwd"] = next(iter(manifest.files.values()))
    (copy / "onecard.json").write_bytes(encode_manifest(manifest))
    with pytest.raises(BundleError, match="outside"):
        onecard.load(copy)

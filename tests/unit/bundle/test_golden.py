"""A bundle of format 1, kept as bytes: every later onecard must still read it and give the same answers.

``tests/golden/bundle-v1`` was written by onecard 0.1.0 from the model of ``tests/conftest.py``; never write it anew.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

import onecard
from onecard.bundle.files import damaged
from onecard.bundle.manifest import FORMAT_VERSION, read_manifest
from onecard.bundle.open import OnecardWarning

GOLDEN = Path(__file__).parents[2] / "golden" / "bundle-v1"


def test_the_manifest_and_every_digest() -> None:
    manifest = read_manifest(GOLDEN)
    assert manifest.format_version == 1 <= FORMAT_VERSION
    assert str(manifest.spec) == "image: float32[B,3,16,16], B=1..4"
    assert damaged(GOLDEN, manifest.files.items()) == {}
    there = {p.relative_to(GOLDEN).as_posix() for p in GOLDEN.rglob("*") if p.is_file()}
    assert there == {*manifest.files, "onecard.json"}


def test_it_answers_as_it_did() -> None:
    golden = load_file(GOLDEN / "golden.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OnecardWarning)  # an engine may be missing here: the next variant serves
        bundle = onecard.load(GOLDEN, device="cpu")
    answer = bundle(image=golden["in.image"])["output"]
    np.testing.assert_allclose(answer, golden["out.output"], rtol=1e-3, atol=1e-4)
    three = bundle(image=np.repeat(golden["in.image"], 3, axis=0))["output"]
    np.testing.assert_allclose(three, np.repeat(answer, 3, axis=0), rtol=1e-3, atol=1e-4)
    bundle.close()

"""The whole search on a real card: CUDA graphs and inductor artifacts built, loaded back, verified and served."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import onecard
from onecard.search.job import EffortSpec
from tests.conftest import INPUT

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

RECIPES = ("eager+channels_last+fold_bn+fp16", "cudagraph.*fp16*", "inductor+*fp16*", "eager+tf32")


@pytest.mark.timeout(600)
def test_a_bundle_from_a_card_answers_like_the_original(cache: Path, model_file: Path, tmp_path: Path) -> None:
    bundle = onecard.optimize(
        f"{model_file}:small",
        inputs=INPUT,
        output=tmp_path / "small.onecard",
        device="cuda:0",
        recipes=RECIPES,
        effort=EffortSpec(0.2, 0.2, 0.1, 3),
    )
    from onecard.bundle.evidence_file import read_evidence
    from onecard.models.load import load_model

    evidence = read_evidence(tmp_path / "small.onecard")
    verdicts = {c.id: c.verdict for c in evidence.candidates}
    assert all(v.reason in ("ok", "slower") for v in verdicts.values()), verdicts
    assert evidence.environment.card is not None
    original = load_model(f"{model_file}:small", inputs=[INPUT]).flat.cuda()
    for rows in (1, 3, 4):  # a bucket, padded up, a bucket
        picture = torch.randn(rows, 3, 16, 16, device="cuda")
        first = bundle(image=picture)["output"]
        kept = first.clone()
        bundle(image=torch.randn_like(picture))
        assert torch.equal(first, kept), "a later call overwrote an answer"
        with torch.inference_mode():
            torch.testing.assert_close(first, original(picture)[0], rtol=2e-2, atol=2e-2)
    bundle.close()


WIDE = """
from torch import nn


def wide():
    return nn.Conv2d(3, 64, 1)
"""


@pytest.mark.timeout(300)
def test_the_peak_is_the_variants_own(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "wide.py").write_text(WIDE)
    onecard.optimize(
        f"{tmp_path / 'wide.py'}:wide",
        inputs="image: float32[B,3,256,256], B=1..32",
        output=tmp_path / "wide.onecard",
        device="cuda:0",
        recipes=("eager+channels_last",),
        effort=EffortSpec(0.1, 0.1, 0.1, 2),
    ).close()
    from onecard.bundle.evidence_file import read_evidence

    original = next(c for c in read_evidence(tmp_path / "wide.onecard").candidates if c.id == "eager")
    given, answered = 32 * 3 * 256 * 256 * 4, 32 * 64 * 256 * 256 * 4
    assert given + answered <= original.measurement.peak_device_bytes <= 1.3 * (given + answered)


@pytest.mark.timeout(300)
def test_a_bundle_from_a_card_falls_back_to_the_original_on_a_cpu(
    cache: Path, model_file: Path, tmp_path: Path
) -> None:
    onecard.optimize(
        f"{model_file}:small",
        inputs=INPUT,
        output=tmp_path / "small.onecard",
        device="cuda:0",
        recipes=("cudagraph.eager+*fp16*",),
        effort=EffortSpec(0.1, 0.1, 0.1, 2),
    ).close()
    with pytest.warns(UserWarning, match="was made for cuda"):
        loaded = onecard.load(tmp_path / "small.onecard", device="cpu")
    assert loaded(image=torch.zeros(2, 3, 16, 16))["output"].shape == (2, 10)

import os
import shutil

import pytest

from onecard.backends import get_backend
from onecard.recipe import Recipe
from tests.unit.backends.small_models import (
    assert_right,
    assert_right_elsewhere,
    build,
    cnn,
    encoder,
    sizes_of,
    target_for,
)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs g++, which is not here")


def test_dynamic_encoder_here_and_in_a_new_process(tmp_path):
    module, spec = encoder()
    target = target_for(Recipe("aoti"), spec, tmp_path)
    ours = ("TORCHINDUCTOR_CACHE_DIR",)  # torch itself sets it when it is first asked for its cache
    before = {k: v for k, v in os.environ.items() if k not in ours}
    build(module, target, tmp_path / "made", B=1, S=8)
    assert {k: v for k, v in os.environ.items() if k not in ours} == before
    assert_right_elsewhere(module, target, tmp_path / "made", B=3, S=7)
    assert_right(module, target, tmp_path / "made", sizes_of(spec))


def test_static_cnn(tmp_path):
    module, spec = cnn()
    target = target_for(Recipe("aoti", static=True), spec, tmp_path, B=2)
    build(module, target, tmp_path / "made")
    assert_right(module, target, tmp_path / "made", [{"B": 2}])


def test_needs_a_compiler(tmp_path, monkeypatch):
    _, spec = cnn()
    monkeypatch.setenv("PATH", str(tmp_path))
    verdict = get_backend("aoti").available(target_for(Recipe("aoti"), spec, tmp_path))
    assert verdict is not None
    assert verdict.reason == "unavailable"
    assert "g++" in verdict.cure

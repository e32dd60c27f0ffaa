import importlib.util

import pytest
import torch

from onecard.backends import get_backend
from onecard.recipe import Recipe
from tests.unit.backends.small_models import assert_right, build, cnn, sizes_of, target_for

MISSING = [name for name in ("torch_tensorrt", "tensorrt") if importlib.util.find_spec(name) is None]


def test_unavailable_on_a_cpu(tmp_path):
    _, spec = cnn()
    verdict = get_backend("tensorrt").available(target_for(Recipe("tensorrt"), spec, tmp_path))
    assert verdict is not None
    assert verdict.reason == "unavailable"


@pytest.mark.skipif(not MISSING, reason="TensorRT is installed")
def test_a_missing_package_names_its_cure(tmp_path):
    _, spec = cnn()
    verdict = get_backend("tensorrt").available(target_for(Recipe("tensorrt"), spec, tmp_path, "cuda:0"))
    assert verdict is not None
    assert verdict.reason == "unavailable"
    assert "onecard[tensorrt]" in verdict.cure


@pytest.mark.skipif(bool(MISSING) or not torch.cuda.is_available(), reason=f"not here: {MISSING or 'a CUDA card'}")
def test_one_engine_serves_every_size(tmp_path):
    module, spec = cnn()
    module.cuda()
    target = target_for(Recipe("tensorrt"), spec, tmp_path, "cuda:0")
    build(module, target, tmp_path / "made", B=2)
    assert_right(module, target, tmp_path / "made", sizes_of(spec))

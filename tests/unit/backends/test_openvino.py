import subprocess
import sys

import pytest
import torch

from onecard.backends import get_backend
from onecard.recipe import Recipe
from tests.unit.backends.small_models import (
    MODELS,
    assert_right,
    assert_right_elsewhere,
    build,
    cnn,
    encoder,
    inputs_for,
    sizes_of,
    target_for,
)

pytest.importorskip("openvino", reason="openvino is not installed")


@pytest.mark.parametrize("name", MODELS)
def test_one_model_serves_every_size(name, tmp_path):
    module, spec = MODELS[name]()
    target = target_for(Recipe("openvino"), spec, tmp_path)
    build(module, target, tmp_path / "made", **{"B": 1} if name == "cnn" else {"B": 1, "S": 8})
    assert_right(module, target, tmp_path / "made", sizes_of(spec))


def test_static_model_in_a_new_process(tmp_path):
    module, spec = encoder()
    target = target_for(Recipe("openvino", static=True), spec, tmp_path, B=2, S=16)
    build(module, target, tmp_path / "made")
    assert_right_elsewhere(module, target, tmp_path / "made", B=2, S=16)


@pytest.mark.parametrize("mode", ["bf16", "fp16"])
def test_lower_precision_is_close_to_fp32(mode, tmp_path):
    module, spec = cnn()
    target = target_for(Recipe("openvino", mode), spec, tmp_path)
    build(module, target, tmp_path / "made", B=2)
    inputs = inputs_for(spec, B=3)
    answer = get_backend("openvino").load(tmp_path / "made", target)(inputs)["output"]
    torch.testing.assert_close(answer, module(inputs["image"])[0].detach(), rtol=0.05, atol=0.05)


def test_unavailable_on_cuda(tmp_path):
    _, spec = cnn()
    verdict = get_backend("openvino").available(target_for(Recipe("openvino"), spec, tmp_path, "cuda:0"))
    assert verdict is not None
    assert verdict.reason == "unavailable"


def test_telemetry_is_never_imported(tmp_path):
    module, spec = cnn()
    target = target_for(Recipe("openvino"), spec, tmp_path)
    build(module, target, tmp_path / "made", B=2)
    code = (
        "import sys; from onecard.backends.openvino import _without_telemetry\n"
        "with _without_telemetry() as ov: ov.Core()\n"
        "assert 'openvino_telemetry' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

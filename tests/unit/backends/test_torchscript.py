import pytest
import torch

from onecard.backends import get_backend
from onecard.errors import Unsupported, UsageError
from onecard.recipe import Recipe
from tests.unit.backends.small_models import (
    MODELS,
    assert_right,
    assert_right_elsewhere,
    build,
    cnn,
    encoder,
    sizes_of,
    target_for,
)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("mode", ["trace", "script"])
def test_one_program_serves_every_size(name, mode, tmp_path):
    module, spec = MODELS[name]()
    target = target_for(Recipe("torchscript", mode), spec, tmp_path)
    build(module, target, tmp_path / "made", **{"B": 1} if name == "cnn" else {"B": 1, "S": 8})
    assert_right(module, target, tmp_path / "made", sizes_of(spec))


def test_static_program_in_a_new_process(tmp_path):
    module, spec = encoder()
    target = target_for(Recipe("torchscript", static=True), spec, tmp_path, B=1, S=16)
    build(module, target, tmp_path / "made")
    assert_right_elsewhere(module, target, tmp_path / "made", B=1, S=16)


def test_precision_flags_cannot_be_scripted(tmp_path):
    module, spec = cnn()
    module.compute_dtype = torch.bfloat16
    with pytest.raises(Unsupported, match="scripting needs"):
        build(module, target_for(Recipe("torchscript", "script"), spec, tmp_path), tmp_path / "made", B=2)


def test_bfloat16_by_transform(tmp_path):
    module, spec = cnn()
    module.inner.bfloat16()
    module.compute_dtype, module.output_dtypes = torch.bfloat16, (torch.float32,)
    target = target_for(Recipe("torchscript", transforms=("bf16",)), spec, tmp_path)
    build(module, target, tmp_path / "made", B=2)
    runner = get_backend("torchscript").load(tmp_path / "made", target)
    answer = runner({"image": torch.ones(3, 3, 32, 32)})["output"]
    assert answer.dtype == torch.float32
    torch.testing.assert_close(answer, module(torch.ones(3, 3, 32, 32))[0], rtol=0.05, atol=0.05)


def test_unknown_mode_lists_the_known(tmp_path):
    _, spec = cnn()
    with pytest.raises(UsageError, match="trace, script"):
        get_backend("torchscript").available(target_for(Recipe("torchscript", "fast"), spec, tmp_path))

"""Precision changes inside a module only: what goes in and comes out keeps its dtype."""

import contextlib
import copy
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor, nn

from onecard.errors import UsageError
from onecard.models.flat import FlatModule, positional
from onecard.transforms import TRANSFORMS, apply_transforms, get_transform
from onecard.transforms.precision import precision_scope


class Classifier(nn.Module):
    """Float and integer inputs, float and integer outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 4)
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(x + self.words(ids))
        self.seen.append(logits.dtype)
        return logits, logits.argmax(-1)


INPUTS = {"x": torch.linspace(-1, 1, 24).reshape(3, 8), "ids": torch.tensor([1, 2, 3])}


def flat() -> FlatModule:
    torch.manual_seed(0)
    return FlatModule(Classifier(), positional(("x", "ids"))).eval()


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("fp32", torch.float32),
        ("tf32", torch.float32),
        ("fp16", torch.float16),
        ("bf16", torch.bfloat16),
        ("autocast_bf16", torch.bfloat16),
        ("autocast_fp16", torch.float16),
    ],
)
@torch.inference_mode()
def test_dtypes_outside_stay_and_inside_change(name, inside):
    module = flat()
    changed = apply_transforms(copy.deepcopy(module), [name], INPUTS)
    logits, classes = changed(*INPUTS.values())
    assert (logits.dtype, classes.dtype) == (torch.float32, torch.int64)
    assert changed.inner.seen[-1] == inside
    torch.testing.assert_close(logits, module(*INPUTS.values())[0], rtol=0.05, atol=0.05)


def test_casts_change_the_weights_and_autocast_does_not():
    assert apply_transforms(flat(), ["bf16"], INPUTS).inner.head.weight.dtype == torch.bfloat16
    assert apply_transforms(flat(), ["autocast_bf16"], INPUTS).inner.head.weight.dtype == torch.float32


def test_transforms_combine_from_left_to_right():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    module = FlatModule(model, positional(("x",))).eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        expected = module(x)[0]
        changed = apply_transforms(copy.deepcopy(module), ["channels_last", "fold_bn", "bf16"], {"x": x})
        answer = changed(x)[0]
    assert isinstance(changed.inner[1], nn.Identity)
    assert changed.inner[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert (answer.dtype, answer.is_contiguous()) == (torch.float32, True)
    torch.testing.assert_close(answer, expected, rtol=0.05, atol=0.05)


def test_an_unknown_transform_lists_the_known():
    with pytest.raises(UsageError, match="unknown transform 'int3': expected one of fp32, tf32"):
        get_transform("int3")


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_in_the_table_is_there(name):
    assert callable(get_transform(name))


def flags() -> tuple[bool, bool]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(("precision", "allowed"), [("tf32", True), ("fp32", False), ("fp16", False)])
def test_precision_scope_sets_both_flags_and_restores_them(precision, allowed):
    before = flags()
    with precision_scope(precision):
        assert flags() == (allowed, allowed)
    assert flags() == before


def test_precision_scope_restores_after_an_error_and_inside_another():
    before = flags()
    with contextlib.suppress(ZeroDivisionError), precision_scope("tf32"):
        with precision_scope("fp32"):
            assert flags() == (False, False)
        assert flags() == (True, True)
        _ = 1 / 0
    assert flags() == before


SETTINGS = {
    "default": "pass",
    "high": "torch.set_float32_matmul_precision('high')",
    "medium": "torch.set_float32_matmul_precision('medium')",
    "new matmul tf32": "b.cuda.matmul.fp32_precision = 'tf32'",
    "new matmul ieee": "b.cuda.matmul.fp32_precision = 'ieee'",
    "new convolution ieee": "b.cudnn.conv.fp32_precision = 'ieee'",
    "new cpu bf16": "b.mkldnn.matmul.fp32_precision = 'bf16'",
    "new tf32": "b.fp32_precision = 'tf32'",
    "new ieee": "b.fp32_precision = 'ieee'",
    "both": "torch.set_float32_matmul_precision('medium'); b.cuda.matmul.fp32_precision = 'ieee'",
}
CHECK = """
import sys
import torch
from onecard.transforms.precision import precision_scope

b = torch.backends
PLACES = (b, b.cudnn, b.mkldnn, b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b.mkldnn.conv)
OLD = (torch.get_float32_matmul_precision, lambda: b.cuda.matmul.allow_tf32, lambda: b.cudnn.allow_tf32)

def read(get):
    try:
        return get()
    except RuntimeError:
        return "raises"

def state():
    return [read(get) for get in OLD] + [place.fp32_precision for place in PLACES]

def within(allow):
    name = "tf32" if allow else "ieee"
    assert [read(get) for get in OLD] == ["high" if allow else "highest", allow, allow], state()
    assert {place.fp32_precision for place in PLACES[3:7]} == {name}, state()

exec(sys.argv[1])
before = state()
with precision_scope("fp32"):
    within(False)
    with precision_scope("tf32"):
        within(True)
    within(False)
assert state() == before, (before, state())
"""


@pytest.mark.parametrize("name", SETTINGS)
def test_what_a_process_had_set_is_there_again(name):
    done = subprocess.run([sys.executable, "-c", CHECK, SETTINGS[name]], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

"""2:4 sparsity: the right two of every four stay, in linears and 1x1 convolutions, and the gate is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onecard.errors import Unsupported
from onecard.evidence import Compression
from onecard.models.flat import FlatModule, positional
from onecard.transforms.sparse24 import MaskedProduct, prune24
from tests.unit.transforms.linears import (
    ALIGNED,
    IMAGES,
    Pixels,
    activations,
    bench,
    compressed,
    error,
    flat,
    gemm,
    rows,
    strict_judge,
    swapped,
    through_a_file,
)


def by_hand(weight: Tensor) -> Tensor:
    """The two largest of every four, one after the other."""
    found = torch.zeros_like(weight)
    for n in range(weight.shape[0]):
        for low in range(0, weight.shape[1], 4):
            four = weight[n, low : low + 4].abs().float().tolist()
            for k in sorted(range(4), key=lambda k: -four[k])[:2]:
                found[n, low + k] = weight[n, low + k]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_two_largest_of_every_four_stay(dtype: torch.dtype) -> None:
    weight = gemm(16, 64, dtype).weight
    pruned = prune24(weight)
    assert pruned.dtype == dtype
    assert torch.equal(pruned, by_hand(weight))
    assert ((pruned.reshape(-1, 4) != 0).sum(-1) == 2).all()


def test_of_equal_magnitudes_only_two_stay() -> None:
    weight = torch.tensor([[1.0, -1.0, 1.0, -1.0, 0.0, 0.0, 3.0, 0.0]])
    assert prune24(weight).tolist() == [[1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 3.0, 0.0]]
    assert weight.tolist() == [[1.0, -1.0, 1.0, -1.0, 0.0, 0.0, 3.0, 0.0]]


def test_the_product_is_that_of_the_pruned_weights() -> None:
    layer, x = gemm(), activations()
    assert layer.bias is not None
    torch.testing.assert_close(MaskedProduct(layer)(x), F.linear(x, prune24(layer.weight), layer.bias))


@pytest.mark.parametrize("before", [(), ("fp16",)])
def test_aligned_layers_are_pruned_and_survive_a_file(before: tuple[str, ...], tmp_path: Path) -> None:
    x, module = rows(), flat()
    wanted = module(x)[0]
    module = compressed("sparse24", module, bench(), before)
    assert swapped(module) == ALIGNED
    for name in ALIGNED:
        weight = module.inner.get_submodule(f"{name}.product").weight
        assert ((weight.reshape(-1, 4) != 0).sum(-1) <= 2).all()
    found = module(x)[0]
    assert 0.02 < error(found, wanted) < 0.7
    assert torch.equal(through_a_file(module, x, tmp_path, dynamic=True)(x)[0], found)


def test_pointwise_convolutions_count_in_channels_last() -> None:
    module = compressed("sparse24", flat(Pixels), bench(IMAGES), ("channels_last",))
    assert swapped(module) == ("narrow", "wide", "head")
    x = rows(IMAGES)
    dense = flat(Pixels)
    for name in swapped(module):
        layer = dense.inner.get_submodule(name)
        layer.weight = nn.Parameter(prune24(layer.weight.flatten(1)).reshape(layer.weight.shape))
    torch.testing.assert_close(module(x)[0], dense(x)[0].detach(), rtol=1e-4, atol=1e-5)


def test_the_judge_is_asked_and_the_loss_is_on_record() -> None:
    found: list[Compression] = []
    module = flat()
    compressed("sparse24", module, bench(judge=strict_judge(module, 1e-6), record=found.append))
    assert [t.passed for t in found[0].trials] == [False] * len(found[0].trials)
    assert found[0].scheme == "sparse24"
    assert not found[0].sensitivity  # sparing single layers is not tried
    assert found[0].trials[0].error > 0.02


def test_nothing_of_a_fitting_size() -> None:
    module = FlatModule(nn.Linear(24, 16), positional(("x",))).eval()
    with pytest.raises(Unsupported, match="no layer that sparse24 applies to"):
        compressed("sparse24", module, bench())

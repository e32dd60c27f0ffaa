"""FP8 layers: as exact as e4m3 allows and not more, aligned layers only, and whole again behind a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onecard.backends.export import quiet_export
from onecard.errors import Unsupported
from onecard.evidence import Compression
from onecard.models.flat import FlatModule, positional
from onecard.transforms.fp8 import FP8, LARGEST, Fp8Product, Fp8RowwiseProduct, to_fp8
from tests.unit.transforms.linears import (
    ALIGNED,
    IMAGES,
    Attention,
    Pixels,
    activations,
    bench,
    channel_errors,
    compressed,
    error,
    flat,
    gemm,
    rows,
    strict_judge,
    swapped,
    through_a_file,
)

NAMES = ("fp8", "fp8_tensor", "fp8_static")
LOWEST, HIGHEST = 0.01, 0.06  # three bits of mantissa on both sides: about 0.037


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [Fp8RowwiseProduct, Fp8Product])
def test_every_channel_is_as_exact_as_the_format(kind: Any, dtype: torch.dtype) -> None:
    layer, x = gemm(dtype=dtype), activations(dtype=dtype)
    errors = channel_errors(kind(layer), layer, x)
    assert errors.max() < HIGHEST
    assert errors.median() > LOWEST


def test_rowwise_scales_keep_rows_and_channels_that_one_scale_loses() -> None:
    layer, x = gemm(bias=False), activations()
    layer.weight[:24] *= 1e-5
    x[:100] *= 1e-5
    assert channel_errors(Fp8RowwiseProduct(layer), layer, x[:100]).max() < HIGHEST
    assert channel_errors(Fp8Product(layer), layer, x)[:24].min() > 0.2


def test_a_static_scale_saturates_beyond_its_bound() -> None:
    layer, x = gemm(), activations(4)
    bound = float(x.abs().amax())
    static, dynamic = Fp8Product(layer, bound), Fp8Product(layer)
    assert torch.equal(static(x), dynamic(x))
    assert torch.equal(static(1e9 * x), static(bound * x.sign()))


def test_the_cast_saturates_and_zeros_stay_zeros() -> None:
    codes = to_fp8(torch.tensor([1e9, -1e9, 0.0, 1.0]), torch.tensor(1.0))
    assert codes.dtype == FP8
    assert codes.float().tolist() == [LARGEST, -LARGEST, 0.0, 1.0]
    layer = gemm(bias=False)
    layer.weight.zero_()
    assert not Fp8RowwiseProduct(layer)(torch.zeros(3, 256)).any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("before", [(), ("fp16",), ("bf16",)])
def test_aligned_layers_are_swapped_and_answers_stay_close(name: str, before: tuple[str, ...]) -> None:
    x, module = rows(), flat()
    wanted = module(x)[0]
    module = compressed(name, module, bench(), before)
    assert swapped(module) == ALIGNED
    assert {module.inner.get_submodule(f"{n}.product").weight.dtype for n in ALIGNED} == {FP8}
    found = module(x)[0]
    assert found.dtype == torch.float32
    assert 0.002 < error(found, wanted) < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_the_program_in_a_file_answers_alike(name: str, tmp_path: Path) -> None:
    module = compressed(name, flat(), bench(), ("bf16",))
    x = rows()
    loaded = through_a_file(module, x, tmp_path, dynamic=True)
    assert torch.equal(loaded(x)[0], module(x)[0])
    assert torch.equal(loaded(x[:3])[0], module(x[:3])[0])
    stored = sorted(str(tensor.dtype) for tensor in loaded.state_dict().values())
    assert stored.count(str(FP8)) == len(ALIGNED)


def test_pointwise_convolutions_count_in_channels_last() -> None:
    place, x = bench(IMAGES), rows(IMAGES)
    wanted = flat(Pixels)(x)[0].detach()
    module = compressed("fp8", flat(Pixels), place, ("channels_last",))
    assert swapped(module) == ("narrow", "wide", "head")
    pixels = module.inner.wide(torch.randn(2, 16, 4, 4).to(memory_format=torch.channels_last))
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert 0.002 < error(module(x)[0], wanted) < 0.1
    assert swapped(compressed("fp8", flat(Pixels), place)) == ("head",)


def test_layers_are_kept_until_the_judge_is_content() -> None:
    records: list[Compression] = []
    module = flat()
    with torch.no_grad():  # one layer whose error alone is too much
        module.inner.down.weight *= 100
    place = bench(judge=strict_judge(module, 0.035), record=records.append)
    before = {name: p.clone() for name, p in module.named_parameters()}
    module = compressed("fp8", module, place)
    assert len(records) == 1
    assert records[0].trials[-1].passed
    assert "down" in records[0].kept
    assert swapped(module) == tuple(name for name in ALIGNED if name not in records[0].kept)
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert not module.inner.down.weight.is_inference()


def test_static_tries_both_methods() -> None:
    records: list[Compression] = []
    module = flat()
    compressed("fp8_static", module, bench(judge=strict_judge(module, 0.1), record=records.append))
    assert {t.method for t in records[0].trials} == {"minmax", "percentile"}
    assert records[0].rows == 12


def test_a_static_scale_needs_rows() -> None:
    with pytest.raises(Unsupported, match="representative inputs"):
        compressed("fp8_static", flat(), bench(calibration=None))


def test_nothing_of_a_fitting_size() -> None:
    module = FlatModule(nn.Linear(10, 10), positional(("x",))).eval()
    with pytest.raises(Unsupported, match="no layer that fp8 applies to"):
        compressed("fp8", module, bench())


def test_the_cure_names_channels_last() -> None:
    module = FlatModule(nn.Conv2d(16, 16, 1), positional(("x",))).eval()
    with pytest.raises(Unsupported) as caught:
        compressed("fp8", module, bench(IMAGES))
    assert "channels_last" in caught.value.cure


def test_a_layer_of_two_names_stays_one() -> None:
    def tied() -> nn.Module:
        model = Attention()
        model.key = model.query
        return model

    inner: Any = compressed("fp8", flat(tied), bench()).inner
    assert inner.key is inner.query
    assert swapped(flat(Attention)) == ()


def test_a_model_that_is_one_layer_is_swapped_whole() -> None:
    module = FlatModule(nn.Linear(32, 16), positional(("x",))).eval()
    x = rows()
    wanted = module(x)[0].detach()
    assert 0.002 < error(compressed("fp8", module, bench())(x)[0], wanted) < 0.1


@pytest.mark.parametrize("norm_first", [False, True])
def test_torchs_own_encoder_layer_goes_its_slow_way(norm_first: bool) -> None:
    def encoder() -> nn.Module:
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, norm_first=norm_first)
        return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    x = rows()
    with torch.no_grad():
        wanted = flat(encoder)(x)[0]
        module = compressed("fp8", flat(encoder), bench())
        layers = ("self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2")
        assert swapped(module) == tuple(f"layers.0.{name}" for name in layers)
        assert 0.002 < error(module(x)[0], wanted) < 0.1


def test_layers_of_one_input_quantise_it_once(tmp_path: Path) -> None:
    module = compressed("fp8_static", flat(), bench())
    with quiet_export():
        graph = torch.export.export(module, (rows(),), strict=False).run_decompositions().graph_module.graph
    from torch._functorch.compile_utils import fx_graph_cse

    def casts(g: torch.fx.Graph) -> int:
        return sum(node.kwargs.get("dtype") == FP8 for node in g.nodes)

    assert (casts(graph), casts(fx_graph_cse(graph))) == (5, 3)


class Experts(nn.Module):
    """Two of which the second gets no token."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, 32)
        answer, chosen = self.first(tokens), tokens[:, 0] > 1e6
        answer[chosen] = self.second(tokens[chosen])
        return answer.reshape(x.shape)


@pytest.mark.parametrize(
    ("scheme", "layers"),
    [
        ("fp8", ("first", "second")),
        ("fp8_tensor", ("first", "second")),
        ("fp8_static", ("first",)),  # the other has no range
    ],
)
@torch.no_grad()
def test_an_expert_without_tokens_is_no_error(scheme: str, layers: tuple[str, ...]) -> None:
    module = compressed(scheme, flat(Experts), bench())
    assert swapped(module) == layers
    assert 0.002 < error(module(rows())[0], flat(Experts)(rows())[0]) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [Fp8RowwiseProduct, Fp8Product, lambda layer: Fp8Product(layer, 1.0)])
def test_no_rows_give_no_rows(make: Any, dtype: torch.dtype) -> None:
    layer = gemm(dtype=dtype)
    some, none = make(layer)(activations(3, dtype=dtype)), make(layer)(activations(0, dtype=dtype))
    assert (none.shape, none.dtype) == ((0, 48), some.dtype)


@pytest.mark.parametrize("scheme", ["fp8", "fp8_tensor"])
@torch.no_grad()
def test_an_experts_tokens_may_be_counted_while_an_exported_program_runs(scheme: str, tmp_path: Path) -> None:
    module, x = compressed(scheme, flat(Experts), bench()), rows()
    loaded = through_a_file(module, x, tmp_path, dynamic=True)
    for tokens in (0, 1, 3):
        x[0, :tokens, 0] = 1e7
        assert torch.equal(loaded(x)[0], module(x)[0])


@torch.no_grad()
def test_layers_are_ranked_beside_an_expert_without_tokens() -> None:
    records: list[Compression] = []
    module = flat(Experts)
    compressed("fp8", module, bench(judge=strict_judge(module, 0.001), record=records.append))
    assert [layer.layer for layer in records[0].sensitivity] == ["first", "second"]


class ReadsWeights(nn.Module):
    """As transformers' T5DenseActDense, which casts to the dtype of its second layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.last = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x).relu()
        return self.last(self.down(x.to(self.down.weight.dtype)).reshape(-1, self.last.in_features)).view(len(x), 6, -1)


@pytest.mark.parametrize("scheme", NAMES)
@torch.no_grad()
def test_a_layer_whose_weight_the_model_reads_is_left(scheme: str) -> None:
    module = compressed(scheme, flat(ReadsWeights), bench())
    assert swapped(module) == ("up", "last")
    assert (module.inner.last.in_features, module.inner.last.out_features) == (32, 32)
    assert 0.002 < error(module(rows())[0], flat(ReadsWeights)(rows())[0]) < 0.1


@torch.no_grad()
def test_a_layer_with_a_hook_keeps_it() -> None:
    def hooked() -> nn.Module:
        model = Attention()
        model.up.register_forward_hook(lambda layer, args, answer: answer * 2)
        return model

    module = compressed("fp8", flat(hooked), bench())
    assert swapped(module) == tuple(name for name in ALIGNED if name != "up")
    assert error(module(rows())[0], flat(hooked)(rows())[0]) < 0.1

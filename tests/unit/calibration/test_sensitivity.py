"""Which layers count, what rounding one of them costs, and that nothing stays behind in the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from onecard.calibration.bench import Bench
from onecard.calibration.sensitivity import quantisable_layers, rank_layers
from onecard.errors import Unsupported
from onecard.models.flat import FlatModule, positional
from onecard.spec import Spec, parse_spec


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.wide = nn.Linear(4, 16)
        self.head = nn.Linear(16, 5)
        self.again = self.head
        self.unused = nn.Linear(4, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = self.norm(self.stem(image)).mean((2, 3))
        return self.head(functional.relu(self.wide(input=x)))


def mixed() -> tuple[FlatModule, Spec]:
    torch.manual_seed(0)
    return FlatModule(Mixed(), positional(("image",))).eval(), parse_spec(["image: float32[B,3,8,8], B=1..8"])


def bench_of(spec: Spec, rows: dict[str, Tensor] | None, **options) -> Bench:
    return Bench(spec, "cpu", rows or {}, rows, **options)


def images(rows: int = 24) -> dict[str, Tensor]:
    return {"image": torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(1))}


def test_layers_with_weights_are_found_once():
    flat, _ = mixed()
    assert quantisable_layers(flat) == ("stem", "wide", "head", "unused")


def test_a_transposed_linear_layer_counts_and_a_compressed_one_does_not():
    transformers = pytest.importorskip("transformers.pytorch_utils")
    layers = nn.Sequential(transformers.Conv1D(6, 4), nn.Linear(6, 3))
    flat = FlatModule(layers, positional(("x",))).eval()
    assert quantisable_layers(flat) == ("0", "1")
    layers[1].weight = nn.Parameter(torch.ones(3, 6, dtype=torch.int8), requires_grad=False)
    assert quantisable_layers(flat) == ("0",)


def test_the_error_is_that_of_the_layer_rounded_by_hand():
    flat, spec = mixed()
    rows = images(8)
    found = {layer.layer: layer.error for layer in rank_layers(flat, bench_of(spec, rows))}
    model = flat.inner
    with torch.no_grad():
        x = functional.relu(model.wide(model.norm(model.stem(rows["image"])).mean((2, 3))))
        scale = x.max() / 255  # after ReLU the zero point is 0
        weight = torch.stack([(r / (r.abs().max() / 127)).round() * (r.abs().max() / 127) for r in model.head.weight])
        rounded = functional.linear((x / scale).round() * scale, weight, model.head.bias)
        exact = model.head(x)
    assert found["head"] == pytest.approx(float((rounded - exact).norm() / exact.norm()), rel=1e-4)
    assert 0 < found["head"] < 0.05


def test_the_layer_with_an_outlier_comes_first():
    flat, spec = mixed()
    with torch.no_grad():
        flat.inner.wide.weight[:, 0] *= 1e-3
        flat.inner.norm.weight[0] = 1e4  # its input: one channel drowns the others
    ranked = rank_layers(flat, bench_of(spec, images()))
    assert ranked[0].layer == "wide"
    assert [r.error for r in ranked] == sorted((r.error for r in ranked), reverse=True)
    assert ranked[0].error > 10 * ranked[1].error
    assert ranked[-1] == type(ranked[-1])("unused", 0.0)


def test_a_channel_of_zeros_is_no_division_by_zero():
    flat, spec = mixed()
    with torch.no_grad():
        flat.inner.head.weight[2] = 0
        flat.inner.wide.weight.zero_()
        flat.inner.wide.bias.fill_(-1.0)  # so the head sees nothing but zeros
    assert all(0 <= r.error < 1 for r in rank_layers(flat, bench_of(spec, images())))


def test_layers_can_be_chosen_and_progress_is_told():
    flat, spec = mixed()
    told: list[str] = []
    ranked = rank_layers(flat, bench_of(spec, images(), progress=told.append), ["head", "stem"])
    assert {r.layer for r in ranked} == {"head", "stem"}
    assert [text.rpartition(" ")[2] for text in told] == ["1/2", "2/2"]


def test_a_few_rows_are_enough():
    flat, spec = mixed()
    seen: list[int] = []
    flat.inner.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    rank_layers(flat, bench_of(spec, images(24)), ["head"])
    assert sum(seen) == 2 * 16  # once as it is and once rounded


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    flat, spec = mixed()
    before = {name: (id(p), p.clone()) for name, p in flat.named_parameters()}

    def progress(text: str) -> None:
        flat.inner.norm.weight = nn.Parameter(torch.ones(3)) if fails and "3/4" in text else flat.inner.norm.weight

    norm = flat.inner.norm.weight
    if fails:
        with pytest.raises(RuntimeError):
            rank_layers(flat, bench_of(spec, images(), progress=progress))
        flat.inner.norm.weight = norm
    else:
        rank_layers(flat, bench_of(spec, images(), progress=progress))
    assert {name: id(p) for name, p in flat.named_parameters()} == {name: key for name, (key, _) in before.items()}
    assert all(torch.equal(p, before[name][1]) for name, p in flat.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in flat.modules())


def test_the_projection_inside_attention_counts_with_the_layer_behind_it():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    flat = FlatModule(layer, positional(("x",))).eval()
    spec = parse_spec(["x: float32[B,S,8], B=1..8, S=1..8"])
    bench = bench_of(spec, {"x": torch.randn(8, 4, 8)})

    def error() -> float:
        return next(r.error for r in rank_layers(flat, bench) if r.layer == "self_attn.out_proj")

    fine = error()
    with torch.no_grad():
        layer.self_attn.in_proj_weight[:, 0] = 300.0  # one large weight makes all of its channel coarse
    assert error() > 10 * fine


def test_without_rows_it_says_how_to_give_some():
    flat, spec = mixed()
    with pytest.raises(Unsupported) as caught:
        rank_layers(flat, bench_of(spec, None))
    assert "--calibration" in caught.value.cure
    with pytest.raises(Unsupported, match="do not fill one batch of 4"):
        rank_layers(flat, bench_of(parse_spec(["image: float32[4,3,8,8]"]), images(3)))

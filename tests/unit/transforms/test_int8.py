"""INT8 on a CPU: what is quantised, what is kept, and how close the answers stay."""

from __future__ import annotations

import builtins
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onecard.calibration.bench import Bench, Judgement, Run
from onecard.errors import MissingDependencyError, Unsupported
from onecard.evidence import Compression
from onecard.models.flat import FlatModule, positional
from onecard.spec import Spec, TensorSpec, parse_spec
from onecard.transforms.int8 import dynamic_int8, static_int8
from onecard.transforms.observers import inner_range
from tests.unit.backends.small_models import cnn, eager, encoder, inputs_for

pytest.importorskip("torchao")
SIZES = {"B": 16, "S": 12}


def bench_for(flat: FlatModule, spec: Spec, limit: float = 0.0, rows: int = 16) -> tuple[Bench, list[Compression]]:
    """A bench with random rows; with a limit also a judge that passes what is closer than it."""
    torch.manual_seed(0)  # rows of their own, not the examples
    sizes = {name: SIZES[name] for name in spec.symbols} | {"B": rows}
    calibration = inputs_for(spec, 5, **sizes)
    wanted = eager(flat, spec, inputs_for(spec, 6, **SIZES))
    found: list[Compression] = []

    def judge(run: Run) -> Judgement:
        given = inputs_for(spec, 6, **SIZES)
        with torch.inference_mode():
            got = run(given)
        error = max(float((got[name] - ref).norm() / ref.norm()) for name, ref in wanted.items())
        return Judgement(error, None, error <= limit)

    example = inputs_for(spec, **dict.fromkeys(spec.symbols, 2))
    return Bench(spec, "cpu", example, calibration, judge if limit else None, record=found.append), found


def plain(model: nn.Module, text: str, *shape: Any) -> tuple[FlatModule, Spec]:
    """A model of one input ``x`` and one output."""
    spec = parse_spec([text])
    spec = Spec(spec.inputs, (TensorSpec("output", "float32", shape),), spec.symbols)
    return FlatModule(model, positional(("x",))).eval(), spec


def quantised(flat: FlatModule) -> list[str]:
    """The kinds of the operators that compute with a weight of 8 bits."""
    return [
        str(node.target).split(".")[1]
        for node in flat.inner.graph.nodes
        if node.op == "call_function"
        and len(node.args) > 1
        and str(getattr(node.args[1], "target", "")).startswith("quantized_decomposed.dequantize_per_channel")
    ]


def relative_l2(flat: FlatModule, wanted: FlatModule, spec: Spec, **sizes: int) -> float:
    inputs = inputs_for(spec, 9, **(sizes or SIZES))
    got, ref = eager(flat, spec, inputs), eager(wanted, spec, inputs)
    return max(float((got[name] - ref[name]).norm() / ref[name].norm()) for name in ref)


def test_static_int8_takes_convolutions_and_linear_layers_and_folds_batch_norm():
    flat, spec = cnn()
    bench, found = bench_for(flat, spec)
    result = static_int8(flat, bench)
    assert quantised(result) == ["conv2d", "conv2d", "linear"]
    assert not any("batch_norm" in str(node.target) for node in result.inner.graph.nodes)
    for size in (1, 3, 8):
        assert 1e-6 < relative_l2(result, flat, spec, B=size) < 0.03
    assert found == [Compression("int8", 3, "minmax", rows=16)]
    weights = [t for t in result.inner.state_dict().values() if t.dtype == torch.int8]
    assert len(weights) == 3


def test_the_original_is_not_changed():
    flat, spec = cnn()
    before = {name: t.clone() for name, t in flat.state_dict().items()}
    static_int8(flat, bench_for(flat, spec, limit=1e-9 + 0.004)[0])
    assert all(torch.equal(before[name], t) for name, t in flat.state_dict().items())


def test_the_three_methods_compete_and_the_worst_layer_is_kept():
    flat, spec = cnn()
    with torch.no_grad():
        flat.inner.head.weight[0, 0] = 50.0  # the other weights of this class are rounded away
    bench, found = bench_for(flat, spec, limit=0.005)
    result = static_int8(flat, bench)
    (record,) = found
    assert [t.method for t in record.trials[:3]] == ["minmax", "histogram", "percentile"]
    assert record.kept == ("head",)
    assert record.sensitivity[0].layer == "head"
    assert quantised(result) == ["conv2d", "conv2d"]
    assert record.trials[-1].passed


def test_a_variant_that_would_keep_every_layer_is_refused():
    model = nn.Sequential(nn.Linear(8, 8))
    flat, spec = plain(model, "x: float32[B,8], B=1..16", "B", 8)
    with pytest.raises(Unsupported, match="no layer is quantised"):
        static_int8(flat, bench_for(flat, spec, limit=1e-5)[0])


def test_dynamic_int8_takes_linear_layers_alone_and_needs_no_rows():
    flat, spec = cnn()
    bench, _ = bench_for(flat, spec)
    result = dynamic_int8(flat, dataclasses.replace(bench, calibration=None))
    assert quantised(result) == ["linear"]
    assert any("choose_qparams" in str(node.target) for node in result.inner.graph.nodes)
    assert 1e-6 < relative_l2(result, flat, spec, B=3) < 0.03


@pytest.mark.parametrize("transform", [static_int8, dynamic_int8])
def test_attention_has_its_projections_quantised_and_any_size_is_taken(transform):
    flat, spec = encoder()
    result = transform(flat, bench_for(flat, spec)[0])
    assert quantised(result) == ["linear"] * 8
    assert relative_l2(result, flat, spec, B=3, S=7) < 0.03
    assert relative_l2(result, flat, spec, B=1, S=1) < 0.1  # nothing to average over: beyond the calibrated range
    assert result.plan.inputs == ("input_ids", "attention_mask")


def test_the_projection_inside_attention_is_kept_with_the_layer_behind_it():
    flat, spec = encoder()
    with torch.no_grad():
        attention = flat.inner.encoder.layers[1].self_attn
        attention.in_proj_weight[2 * 32 :, 0] = 5.0
    bench, found = bench_for(flat, spec, limit=0.008)
    result = static_int8(flat, bench)
    assert found[0].kept[0] == "encoder.layers.1.self_attn.out_proj"
    assert len(quantised(result)) == 8 - 2 - (len(found[0].kept) - 1)


class Twice(nn.Module):
    """One layer called twice, a sum with a number, and a weight that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.fc = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(self.conv(x)) + 1.0) + x
        x = nn.functional.conv2d(x, self.conv.weight / self.conv.weight.norm(), padding=1)
        return self.fc(x.mean((2, 3)))


def test_a_layer_that_is_called_twice_and_one_without_a_weight_of_its_own():
    torch.manual_seed(0)
    flat, spec = plain(Twice(), "x: float32[B,3,8,8], B=1..16", "B", 4)
    result = static_int8(flat, bench_for(flat, spec)[0])
    assert quantised(result) == ["conv2d", "conv2d", "linear"]
    assert relative_l2(result, flat, spec, B=4) < 0.05


class Unread(nn.Module):
    """A pooler behind the encoder, as sentence encoders have it, whose answer nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 16)
        self.pooler = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        torch.tanh(self.pooler(y))
        return y


@pytest.mark.parametrize("transform", [static_int8, dynamic_int8])
def test_a_layer_whose_answer_nobody_reads_is_left_out(transform):
    flat, spec = plain(Unread(), "x: float32[B,8], B=1..16", "B", 16)
    bench, _ = bench_for(flat, spec)
    assert quantised(transform(flat, bench)) == ["linear"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 8)
        self.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(self.words(x)))


def test_a_weight_that_an_embedding_shares_can_be_kept():
    torch.manual_seed(0)
    flat, spec = plain(Tied(), "x: int64[B,S] in 0..11, B=1..16, S=1..12", "B", "S", 12)
    bench, _ = bench_for(flat, spec)
    bench.memo["int8"] = Compression("int8", 2, "minmax", kept=("head",))  # as if that had been settled
    weights = [t.shape for t in static_int8(flat, bench).inner.state_dict().values() if t.dtype == torch.int8]
    assert weights == [(8, 8)]


def test_tiny_weights_keep_their_resolution():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.LayerNorm(16))
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    flat, spec = plain(model, "x: float32[B,16], B=1..16", "B", 16)
    assert relative_l2(static_int8(flat, bench_for(flat, spec)[0]), flat, spec, B=8) < 0.03


def test_outliers_are_cut_by_the_percentile_alone():
    values = torch.cat([torch.linspace(-1, 2, 20_000), torch.tensor([1000.0])])
    low, high = inner_range(values.reshape(-1, 3))
    assert low == pytest.approx(-1, abs=1e-3)
    assert high == pytest.approx(2, abs=1e-3)
    assert inner_range(torch.tensor([3.0])).tolist() == [3.0, 3.0]
    large = torch.randn(1 << 21, generator=torch.Generator().manual_seed(0))
    assert inner_range(large).abs().tolist() == pytest.approx([3.72, 3.72], abs=0.25)  # of a normal distribution


def test_without_rows_it_says_how_to_give_some():
    flat, spec = cnn()
    bench, _ = bench_for(flat, spec)
    with pytest.raises(Unsupported) as caught:
        static_int8(flat, dataclasses.replace(bench, calibration=None))
    assert "--calibration" in caught.value.cure


def test_nothing_to_quantise():
    flat, spec = plain(nn.ReLU(), "x: float32[B,8], B=1..16", "B", 8)
    with pytest.raises(Unsupported, match="no layer that int8 applies to"):
        static_int8(flat, bench_for(flat, spec)[0])


class OneSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        rows = [self.fc(row) for row in x]
        return torch.stack(rows)


def test_a_model_that_cannot_be_exported_for_all_sizes_is_refused_with_the_cause():
    flat, spec = plain(OneSize(), "x: float32[B,8], B=1..16", "B", 8)
    with pytest.raises(Unsupported, match=r"every size.*exported at"):
        static_int8(flat, bench_for(flat, spec)[0])


def test_without_torchao_the_cure_is_its_extra(monkeypatch):
    flat, spec = cnn()
    bench, _ = bench_for(flat, spec)
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("torchao"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError) as caught:
        static_int8(flat, bench)
    assert "onecard[quantize]" in caught.value.cure

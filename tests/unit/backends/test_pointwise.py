"""The respelling of elementwise operators: the same answers, and only where it pays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode

from onecard.backends.pointwise import respell_pointwise

aten = torch.ops.aten
GELU, CLAMP, TO = aten.gelu.default, aten.clamp.default, aten.to.dtype
HALF = (torch.float16, torch.bfloat16)
FP8 = torch.float8_e4m3fn


def graph_of(device: str, dtype: torch.dtype, *calls) -> fx.GraphModule:
    """Operators in a row on one tensor, as if traced on a device that need not be here."""
    with FakeTensorMode():
        value = torch.empty(8, 64, device=device, dtype=dtype)
        graph = fx.Graph()
        node = graph.placeholder("x")
        node.meta["val"] = value
        for operator, args, kwargs in calls:
            node = graph.call_function(operator, (node, *args), kwargs)
            value = operator(value, *args, **kwargs)
            node.meta["val"] = value
        graph.output(node)
    return fx.GraphModule(nn.Module(), graph)


def targets(module: fx.GraphModule) -> list:
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


def gelu(device: str, dtype: torch.dtype, **kwargs: str) -> fx.GraphModule:
    return graph_of(device, dtype, (GELU, (), kwargs))


def to_fp8(device: str, low: float, high: float, dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    return graph_of(device, dtype, (CLAMP, (low, high), {}), (TO, (FP8,), {}))


@pytest.mark.parametrize("dtype", HALF)
def test_gelu_in_half_precision_differs_by_less_than_its_rounding(dtype):
    module = respell_pointwise(gelu("cuda", dtype))
    assert GELU not in targets(module)
    x = torch.cat([torch.linspace(-12, 12, 200_001), torch.randn(200_000)]).to(dtype)
    wanted = nn.functional.gelu(x.double())
    got = module(x)
    assert got.dtype == dtype
    rounding = (wanted.to(dtype).double() - wanted).abs()
    assert ((got.double() - wanted).abs() <= 2 * rounding.max()).all()
    assert (got.double() - wanted).norm() <= 1.05 * rounding.norm()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_the_tanh_form_is_the_same_function(device, dtype):
    module = respell_pointwise(gelu(device, dtype, approximate="tanh"))
    assert GELU not in targets(module)
    x = torch.linspace(-12, 12, 100_001).to(dtype)
    wanted = nn.functional.gelu(x.double(), approximate="tanh")
    torch.testing.assert_close(module(x).double(), wanted, atol=1e-6, rtol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kwargs", [{}, {"approximate": "tanh"}])
def test_the_largest_numbers_and_none_at_all(dtype, kwargs):
    module = respell_pointwise(gelu("cuda", dtype, **kwargs))
    most = torch.finfo(dtype).max
    x = torch.tensor([most, -most, 0.0, float("inf"), float("nan")], dtype=dtype)
    found = module(x)
    assert found[3] == float("inf")
    assert found[4].isnan()
    torch.testing.assert_close(found[:3], torch.tensor([most, 0.0, 0.0], dtype=dtype), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    "module", [gelu("cuda", torch.float32), gelu("cpu", torch.bfloat16), gelu("cpu", torch.float64, approximate="tanh")]
)
def test_what_would_not_be_better_stays(module):
    assert targets(respell_pointwise(module)) == [GELU]


def test_a_card_saturates_by_itself():
    assert targets(respell_pointwise(to_fp8("cuda", -448.0, 448.0))) == [TO]


@pytest.mark.parametrize(
    "module",
    [
        to_fp8("cpu", -448.0, 448.0),  # PyTorch's conversion gives NaN
        to_fp8("cuda", -440.0, 448.0),
        to_fp8("cuda", 0.0, 448.0),
        to_fp8("cuda", -448.0, 448.0, torch.float16),
        graph_of("cuda", torch.float32, (CLAMP, (-448.0, 448.0), {}), (TO, (torch.float16,), {})),
    ],
)
def test_other_clamps_stay(module):
    assert targets(respell_pointwise(module)) == [CLAMP, TO]


def test_weights_that_are_e4m3_already_are_left_alone():
    module = to_fp8("cuda", -448.0, 448.0)
    with FakeTensorMode():
        weight = torch.empty(64, 64, dtype=FP8, device="cuda")
    module.register_buffer("weight", torch.empty(64, 64, dtype=FP8))
    with module.graph.inserting_before(next(iter(module.graph.nodes))):
        module.graph.get_attr("weight").meta["val"] = weight
        module.graph.placeholder("codes").meta["val"] = weight
    output = next(node for node in module.graph.nodes if node.op == "output")
    output.update_arg(0, (output.args[0], *(n for n in module.graph.nodes if n.op in ("get_attr", "placeholder"))))
    assert targets(respell_pointwise(module)) == [TO]


def test_a_clamp_that_others_read_too_stays_for_them():
    module = to_fp8("cuda", -448.0, 448.0)
    clamp = next(node for node in module.graph.nodes if node.target is CLAMP)
    output = next(node for node in module.graph.nodes if node.op == "output")
    output.update_arg(0, (output.args[0], clamp))
    respell_pointwise(module)
    x = torch.tensor([1000.0, 2.0])
    assert module(x)[1].tolist() == [448.0, 2.0]


class Fp8Like(nn.Module):
    """The cast of compressed layers as it is written."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() * 3.0).clamp(-448.0, 448.0).to(FP8)


def test_the_clamp_of_our_own_layers_is_the_one_that_is_known():
    program = torch.export.export(Fp8Like(), (torch.randn(4, 4),))
    calls = [node for node in program.module().graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    cast = next(node for node in calls if node.meta["val"].dtype == FP8)
    assert cast.args[0].target is CLAMP
    assert cast.args[0].args[1:] == (-448.0, 448.0)

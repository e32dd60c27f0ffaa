"""Nodes run in an order that needs less memory, and answer the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.nn import functional as F

from onecard.backends.order import _Schedule, order_for_memory

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # PyTorch's own

aten = torch.ops.aten
PLANE = 2 * 16 * 16 * 4  # bytes of one channel of the pictures here


class Residual(nn.Module):
    """A bottleneck whose short branch is written last, as torchvision has it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(32, 32, 1)
        self.first, self.second = nn.Conv2d(32, 16, 1), nn.Conv2d(16, 64, 1)
        self.short = nn.Conv2d(32, 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = self.second(self.first(x).relu())
        return F.interpolate((y + self.short(x)).relu().mean((2, 3), keepdim=True), scale_factor=2.0)


def exported(module: nn.Module, x: Tensor, **kwargs) -> fx.GraphModule:
    """Functional ATen operators, as a compiler's passes see them."""
    return torch.export.export(module.eval(), (x,), **kwargs).run_decompositions().module()


def peak_of(module: fx.GraphModule) -> int:
    schedule = _Schedule(list(module.graph.nodes))
    assert schedule.is_known
    return schedule.peak(schedule.nodes)[0]


def weights_of(module: fx.GraphModule) -> list[str]:
    """The weights of the convolutions in the order in which they run."""
    calls = [node for node in module.graph.nodes if "conv" in str(node.target) and node.op == "call_function"]
    return [str(node.args[1].target).split(".")[0] for node in calls]


def test_the_short_branch_comes_first_and_the_block_s_input_goes():
    model, x = Residual(), torch.randn(2, 32, 16, 16)
    module = exported(model, x)
    assert weights_of(module) == ["stem", "first", "second", "short"]
    assert peak_of(module) == (64 + 64 + 32) * PLANE
    order_for_memory(module.graph)
    module.graph.lint()
    module.recompile()
    assert weights_of(module) == ["stem", "short", "first", "second"]
    assert peak_of(module) == (64 + 64 + 16) * PLANE
    torch.testing.assert_close(module(x), model(x), rtol=0, atol=0)


def test_a_compiler_keeps_the_order():
    seen: list[list[str]] = []

    def note(graph: fx.Graph) -> None:
        order_for_memory(graph)
        calls = [n for n in graph.nodes if n.target is aten.convolution.default]
        seen.append([str(tuple(n.args[1].meta["val"].shape[:2])) for n in calls])

    from torch._inductor import config

    model, x = Residual().eval(), torch.randn(2, 32, 16, 16)
    with torch.inference_mode(), config.patch({"post_grad_custom_post_pass": note}):
        found = torch.compile(model)(x)
    torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)
    assert seen == [["(32, 32)", "(64, 32)", "(16, 32)", "(64, 16)"]]


def test_strides_that_freezing_settles_are_no_second_answer():
    """The largest tensor of a segmentation model is its answer: taken for two, it hides the peak before it."""
    from torch._inductor.freezing import enforce_output_layout

    class Enlarged(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            y = (self.second(self.first(x).relu()) + self.short(x)).relu()
            return F.interpolate(F.avg_pool2d(y, 2)[:, :24], scale_factor=4.0)

    x = torch.randn(2, 32, 16, 16)
    module = exported(Enlarged(), x)
    enforce_output_layout(module)  # the pass of freezing, on a graph in which no other pass has fused anything
    added = [node for node in module.graph.nodes if "inductor_force_stride_order" in str(node.target)]
    for node in added:
        node.meta["val"] = node.args[0].meta["val"]
    assert len(added) == 1
    order_for_memory(module.graph)
    assert weights_of(module) == ["stem", "short", "first", "second"]


def test_symbolic_sizes_are_left_as_they_are():
    x = torch.randn(2, 32, 16, 16)
    module = exported(Residual(), x, dynamic_shapes={"x": {0: Dim("B", min=1, max=8)}})
    order_for_memory(module.graph)
    assert weights_of(module) == ["stem", "first", "second", "short"]


def test_what_elementwise_operators_alone_read_is_never_there():
    class Gelu(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.sort().values
            return (x * 0.5 * (1 + torch.tanh(0.8 * (x + 0.04 * x**3)))).sum(1)

    x = torch.randn(64, 64)
    assert peak_of(exported(Gelu(), x)) < 3.1 * x.nbytes + 64 * 64 * 8  # of the sort: values, places; GELU; sums


def test_the_work_has_a_bound_that_small_graphs_do_not_reach(monkeypatch):
    """Branches whose wide answers are all there before the first is reduced: each move lets one go."""

    def wide(count: int) -> fx.Graph:
        graph = fx.Graph()
        x = graph.placeholder("x")
        x.meta["val"] = torch.empty(64, 64, device="meta")

        def call(target, *args):
            node = graph.call_function(target, args)
            node.meta["val"] = target(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in args))
            return node

        answers = [call(aten.mm.default, x, x) for _ in range(count)]
        graph.output(tuple(call(aten.sum.dim_IntList, answer, [0]) for answer in answers))
        return graph

    steps = 0
    peak = _Schedule.peak

    def counted(self, order):
        nonlocal steps
        steps += len(order)
        return peak(self, order)

    monkeypatch.setattr(_Schedule, "peak", counted)
    large, small = wide(250), wide(20)
    order_for_memory(large)
    assert 200_000 < steps < 600_000
    large.lint()
    order_for_memory(small)
    schedule = _Schedule(list(small.nodes))
    assert schedule.peak(schedule.nodes)[0] < 2 * 64 * 64 * 4 + 20 * 64 * 4


def test_random_numbers_are_drawn_in_their_order():
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.cat([x, x, x])
            return torch.cat([y.sum(0, keepdim=True), torch.rand_like(x[:1]), torch.rand_like(x[:1])])

    model, x = Noisy(), torch.randn(4, 64)
    module = exported(model, x)
    order_for_memory(module.graph)
    module.recompile()
    torch.manual_seed(0)
    wanted = model(x)
    torch.manual_seed(0)
    assert torch.equal(module(x), wanted)


@st.composite
def graphs(draw: st.DrawFn) -> fx.GraphModule:
    """Random graphs of operators that enlarge, shrink, look and add, over one input."""
    graph = fx.Graph()
    known = [graph.placeholder("x")]
    known[0].meta["val"] = torch.ones(8)
    for _ in range(draw(st.integers(1, 25))):
        source = draw(st.sampled_from(known))
        value = source.meta["val"]
        kind = draw(st.sampled_from(["repeat", "half", "view", "add", "relu", "flip"]))
        if kind == "repeat" and len(value) <= 64:
            call = (aten.repeat.default, (source, [draw(st.integers(1, 3))]))
        elif kind == "half" and len(value) > 1:
            call = (aten.slice_copy.Tensor, (source, 0, 0, len(value) // 2))
        elif kind == "view":
            call = (aten.view.default, (source, [-1]))
        elif kind == "add":
            others = [n for n in known if n.meta["val"].shape == value.shape]
            call = (aten.add.Tensor, (source, draw(st.sampled_from(others))))
        elif kind == "flip":
            call = (aten.flip.default, (source, [0]))
        else:
            call = (aten.relu.default, (source,))
        node = graph.call_function(*call)
        node.meta["val"] = call[0](*(a.meta["val"].clone() if isinstance(a, fx.Node) else a for a in call[1]))
        known.append(node)
    graph.output(tuple(n for n in known[1:] if draw(st.booleans()) or n is known[-1]))
    return fx.GraphModule(nn.Module(), graph)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(graphs())
def test_any_graph_answers_the_same_and_never_needs_more(module):
    x = torch.arange(8.0)
    wanted = [t.clone() for t in module(x)]
    before = peak_of(module)
    order_for_memory(module.graph)
    module.graph.lint()
    module.recompile()
    assert peak_of(module) <= before
    for found, right in zip(module(x), wanted, strict=True):
        assert torch.equal(found, right)

"""Linears that read one tensor become one, answers stay, and whoever is called alone still answers."""

import contextlib
import copy
import threading

import pytest
import torch
from torch import Tensor, nn

from onecard.backends.export import quiet_export
from onecard.errors import Unsupported
from onecard.models.flat import FlatModule, plan_call, positional
from onecard.transforms import apply_transforms
from onecard.transforms.fuse_qkv import LinearPiece, StackedLinear


class Attention(nn.Module):
    """Query, key and value of different widths, one without a bias, read as views."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(16, 16)
        self.key = nn.Linear(16, 16, bias=False)
        self.value = nn.Linear(16, 24)
        self.out = nn.Linear(24, 16)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        other = x if memory is None else memory
        q, k, v = (
            part.view(*part.shape[:-1], 2, -1).transpose(1, 2)
            for part in (self.query(x), self.key(other), self.value(other))
        )
        y = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


def flat(model: nn.Module) -> FlatModule:
    torch.manual_seed(0)
    return FlatModule(model, positional(("x",))).eval()


def fuse(module: FlatModule, x: Tensor, *others: str) -> FlatModule:
    return apply_transforms(copy.deepcopy(module), ["fuse_qkv", *others], {"x": x})


def kinds(module: nn.Module) -> tuple[int, int]:
    found = list(module.modules())
    return sum(isinstance(m, StackedLinear) for m in found), sum(isinstance(m, LinearPiece) for m in found)


@torch.inference_mode()
def test_three_become_one_and_answers_stay():
    module, x, other = flat(Attention()), torch.randn(2, 5, 16), torch.randn(3, 9, 16)
    fused = fuse(module, x)
    assert kinds(fused) == (1, 2)
    assert fused.inner.query.linear.weight.shape == (56, 16)
    assert sum(isinstance(m, nn.Linear) for m in fused.modules()) == 2
    assert sum(p.numel() for p in fused.parameters()) == sum(p.numel() for p in module.parameters()) + 16  # key's bias
    torch.testing.assert_close(fused(other), module(other))
    assert fused.inner.query._link.cells.last is None  # no activation outlives the call


def products(module: nn.Module, call) -> list[int]:
    """The output widths of the linears that one call runs."""
    found = []
    hooks = [
        m.register_forward_hook(lambda m, a, y: found.append(y.shape[-1]))
        for m in module.modules()
        if isinstance(m, nn.Linear)
    ]
    call()
    for hook in hooks:
        hook.remove()
    return found


@torch.inference_mode()
def test_one_product_serves_all_and_only_those_with_the_same_tensor():
    module = flat(Attention())
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    fused = fuse(module, x)
    assert products(fused, lambda: fused(x)) == [56, 16]
    torch.testing.assert_close(fused.inner(x, memory), module.inner(x, memory))  # cross attention: its own product


@torch.inference_mode()
def test_precision_layout_and_a_replaced_linear_reach_every_piece():
    module, x = flat(Attention()), torch.randn(2, 5, 16)
    half = fuse(module, x, "bf16")
    assert half.inner.query.linear.weight.dtype == torch.bfloat16
    torch.testing.assert_close(half(x), module(x), rtol=0.05, atol=0.05)
    fused = fuse(module, x)
    fused.inner.query.linear = nn.Sequential(fused.inner.query.linear)  # as a quantiser would
    torch.testing.assert_close(fused(x), module(x))
    torch.testing.assert_close(copy.deepcopy(fused)(x), module(x))


def test_an_exported_graph_has_one_product_too():
    module, x = flat(Attention()), torch.randn(2, 5, 16)
    fused = fuse(module, x)
    with quiet_export():
        program = torch.export.export(fused, (x,), strict=False)
    linears = [n for n in program.graph.nodes if n.target == torch.ops.aten.linear.default]
    assert len(linears) == 2
    other = torch.randn(2, 5, 16)
    torch.testing.assert_close(program.module()(other), module(other))


def test_two_threads_do_not_mix_their_pieces():
    module = flat(Attention())
    fused = fuse(module, torch.randn(2, 5, 16))
    inputs = [torch.randn(2, 5, 16) for _ in range(4)]
    wanted = [module(x)[0] for x in inputs]
    wrong = []

    def run(x: Tensor, want: Tensor) -> None:
        with torch.inference_mode():
            wrong.extend(i for i in range(100) if not torch.allclose(fused(x)[0], want, atol=1e-5))

    threads = [threading.Thread(target=run, args=pair) for pair in zip(inputs, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


class Gated(nn.Module):
    """What part of the model runs depends on the request."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, part: Tensor) -> Tensor:
        if part.item() == 2:
            raise ValueError("no such part" if self.a(x).dim() else "")
        return self.b(x) if part.item() == 1 else self.a(x) if part.item() else self.a(x) + self.b(x)


@pytest.mark.parametrize("copied", [False, True])
@torch.inference_mode()
def test_a_call_that_runs_only_the_first_leaves_nothing_to_the_next(copied):
    torch.manual_seed(0)
    module = FlatModule(Gated(), positional(("x", "part"))).eval()
    both, first, second, failing = (torch.tensor(i) for i in (0, -1, 1, 2))
    fused = apply_transforms(copy.deepcopy(module), ["fuse_qkv"], {"x": torch.randn(2, 8), "part": both})
    assert kinds(fused) == (1, 1)
    fused = copy.deepcopy(fused) if copied else fused
    buffer = torch.randn(2, 8)
    for part in (first, failing):
        with contextlib.suppress(ValueError):
            fused(buffer, part)
        assert fused.inner.a._link.cells.last is None  # no activation outlives the call
        buffer.normal_()
        torch.testing.assert_close(fused(buffer, second), module(buffer, second))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own
@torch.inference_mode()
def test_a_copy_has_pieces_of_its_own_and_a_traced_or_compiled_module_answers_alike():
    module, x, other = flat(Attention()), torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    fused = fuse(module, x)
    again = copy.deepcopy(fused).inner
    assert again.query._link is again.value._link is not fused.inner.query._link
    assert again.query._link.stacked is again.query
    for run in (torch.jit.trace(fused, (x,)), torch.compile(fused, backend="eager", fullgraph=True)):
        torch.testing.assert_close(run(other), module(other))


@torch.inference_mode()
def test_threads_have_cells_of_their_own():
    fused = fuse(flat(Attention()), torch.randn(2, 5, 16)).inner
    x = torch.randn(2, 5, 16)
    fused.query(x)
    thread = threading.Thread(target=fused.query, args=(x.clone(),))
    thread.start()
    thread.join()
    assert products(fused, lambda: fused.key(x)) == []  # still there


def test_an_hf_encoder_is_fused_the_same_way_every_time():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50
    )
    ids, mask = torch.randint(0, 50, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    plan, inputs = plan_call((), {"input_ids": ids, "attention_mask": mask})
    module = FlatModule(transformers.BertModel(config), plan).eval()
    once, again = (apply_transforms(copy.deepcopy(module), ["fuse_qkv"], inputs) for _ in range(2))
    assert kinds(once) == (2, 4)
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), again.parameters(), strict=True))
    with torch.inference_mode():
        for old, new in zip(module(ids, mask), once(ids, mask), strict=True):
            torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-5)


class Apart(nn.Module):
    """Two linears that read the same object, which changes in place between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = self.a(x)
        x.add_(1)
        return y + self.b(x)


class Flattened(Apart):
    """A piece of which the model wants a view that only a tensor of its own has."""

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).view(-1) + self.b(x).view(-1)


class Tied(Apart):
    def __init__(self) -> None:
        super().__init__()
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), "no two linear layers"),
        (Apart(), "no two linear layers"),
        (Tied(), "no two linear layers"),
        (Flattened(), "after fusing linear layers the model fails: RuntimeError"),
    ],
    ids=["one after the other", "changed in place", "tied weights", "view"],
)
def test_what_cannot_be_fused_is_refused(model, reason):
    with pytest.raises(Unsupported, match=reason):
        fuse(flat(model), torch.randn(4, 8))

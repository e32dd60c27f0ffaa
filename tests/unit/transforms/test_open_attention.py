"""PyTorch's attention over layers of its own: the same answers for every call, no copies, and four layers a block."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from onecard.backends import get_backend
from onecard.backends.base import Target
from onecard.backends.export import quiet_export
from onecard.evidence import Compression
from onecard.models.flat import FlatModule, plan_call, positional
from onecard.recipe import Recipe
from onecard.spec import TensorSpec
from onecard.transforms import apply_transforms
from onecard.transforms.fp8 import fp8_rowwise, fp8_static, fp8_tensorwise
from onecard.transforms.int8_linear import dynamic_int8_linear, static_int8_linear
from onecard.transforms.low_precision import Scheme, copy_module, find_layers
from onecard.transforms.open_attention import PROJECTIONS, OpenAttention, open_attention
from onecard.transforms.sparse24 import sparse24
from onecard.transforms.weight_only import int4_weights, int8_weights
from tests.unit.transforms.linears import bench, error, flat, rows, strict_judge, swapped, through_a_file

WIDTH = 24
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 0.02}
BLOCK = ("attention.in_proj", "attention.out_proj", "up", "down")
SCHEMES = (
    *(fp8_rowwise, fp8_tensorwise, fp8_static, dynamic_int8_linear, static_int8_linear),
    *(sparse24, int8_weights, int4_weights),
)
TWO_BLOCKS = tuple(f"blocks.{index}.{name}" for index in range(2) for name in BLOCK)


@pytest.fixture
def slow_path() -> Iterator[None]:
    """Torch's own attention without its fast path, which ignores what it is told about causality."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


class Block(nn.Module):
    """A block as torchvision's ViT has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        normal = self.norm(x)
        x = x + self.attention(normal, normal, normal, need_weights=False)[0]
        answer: Tensor = x + self.down(nn.functional.gelu(self.up(self.second(x))))
        return answer


class Vit(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.head(self.blocks(x)[:, 0])
        return answer


class Around(nn.Module):
    """An attention that is called in some way."""

    def __init__(self, attention: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.attention = attention
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.attention, x)


def itself(attention: nn.Module, x: Tensor) -> Tensor:
    answer: Tensor = attention(x, x, x)[0]
    return answer


def make_attention(heads: int = 2, **more: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(WIDTH, heads, **more)
    for bias in (attention.in_proj_bias, attention.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    return attention.eval().requires_grad_(False)


def opened(attention: nn.Module, call: Callable[[nn.Module, Tensor], Tensor] = itself) -> Any:
    """What an attention becomes in a model that calls it so."""
    module = FlatModule(Around(attention, call), positional(("x",))).eval()
    return open_attention(module, {"x": torch.randn(2, 5, WIDTH)}).inner.attention


def attn_mask(kind: str, heads: int, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor | None:
    """None, or ``[L, S]``, or ``[B * heads, L, S]``; the first key is open to all."""
    size = (shape[0] * heads, *shape[1:]) if kind.endswith("3") else shape[1:]
    return {"none": None, "bool": _bool(size), "float": torch.randn(size, dtype=dtype)}[kind.rstrip("23")]


def padding_mask(kind: str, size: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    return {"none": None, "bool": _bool(size), "float": torch.randn(size, dtype=dtype)}[kind]


def _bool(size: tuple[int, ...]) -> Tensor:
    mask = torch.rand(size) > 0.6
    mask[..., 0] = False
    return mask


def same_kind(masks: tuple[str, str]) -> bool:
    """Masks of two kinds are deprecated by PyTorch."""
    return "none" in masks or masks[0].rstrip("23") == masks[1]


@torch.inference_mode()
@settings(max_examples=300, deadline=None)
@given(
    batch_first=st.booleans(),
    unbatched=st.booleans(),
    bias=st.booleans(),
    heads=st.sampled_from([2, 3]),
    projections=st.sampled_from(list(PROJECTIONS)),
    called=st.sampled_from(list(PROJECTIONS)),
    masks=st.tuples(
        st.sampled_from(["none", "bool2", "bool3", "float2", "float3"]), st.sampled_from(["none", "bool", "float"])
    ).filter(same_kind),
    need_weights=st.booleans(),
    average=st.booleans(),
    dtype=st.sampled_from(list(LIMITS)),
    seed=st.integers(0, 100),
)
def test_any_call_is_answered_alike(  # noqa: PLR0913, PLR0917 - each is drawn
    batch_first: bool,
    unbatched: bool,
    bias: bool,
    heads: int,
    projections: tuple[bool, bool],
    called: tuple[bool, bool],
    masks: tuple[str, str],
    need_weights: bool,
    average: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    attention = make_attention(heads, bias=bias, batch_first=batch_first).to(dtype)
    ours = OpenAttention(attention, PROJECTIONS[projections]).eval()
    torch.manual_seed(seed)
    batch, queries, keys = 1 if unbatched else 3, 5, 5 if called[0] else 7

    def tokens(count: int) -> Tensor:
        x = torch.randn(batch, count, WIDTH, dtype=dtype)
        return x[0] if unbatched else x if batch_first else x.transpose(0, 1)

    query = tokens(queries)
    key = query if called[0] else tokens(keys)
    value = key if called[1] else tokens(keys)
    more = {
        "attn_mask": attn_mask(masks[0], heads, (batch, queries, keys), dtype),
        "key_padding_mask": padding_mask(masks[1], (keys,) if unbatched else (batch, keys), dtype),
        "need_weights": need_weights,
        "average_attn_weights": average,
    }
    wanted, found = attention(query, key, value, **more), ours(query, key, value, **more)
    assert (found[1] is None) == (wanted[1] is None) == (not need_weights)
    for new, old in zip(found[: 1 + need_weights], wanted, strict=False):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
        assert error(new, old) < LIMITS[dtype]


@pytest.mark.usefixtures("slow_path")
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mask", ["causal", "other"])
def test_the_causal_hint_means_the_same(mask: str, padded: bool, need_weights: bool) -> None:
    """Without padding and weights the hint counts and not the mask, whatever that says."""
    attention, x = make_attention(batch_first=True), torch.randn(3, 5, WIDTH)
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    more = {
        "attn_mask": causal if mask == "causal" else torch.zeros_like(causal),
        "key_padding_mask": _bool((3, 5)) if padded else None,
        "need_weights": need_weights,
        "is_causal": True,
    }
    found, wanted = opened(attention)(x, x, x, **more)[0], attention(x, x, x, **more)[0]
    assert error(found, wanted) < LIMITS[torch.float32]


@pytest.mark.usefixtures("slow_path")
def test_a_causal_hint_without_a_mask_is_refused_by_both() -> None:
    attention, x = make_attention(), torch.randn(5, 3, WIDTH)
    for either in (attention, opened(attention)):
        with pytest.raises(RuntimeError, match="is_causal"):
            either(x, x, x, is_causal=True)


@torch.inference_mode()
@pytest.mark.usefixtures("slow_path")
def test_a_row_of_nothing_but_padding_is_answered_as_on_the_slow_path() -> None:
    attention, x = make_attention(batch_first=True), torch.randn(2, 5, WIDTH)
    padding = torch.tensor([[False] * 5, [True] * 5])
    for need_weights in (False, True):
        more = {"key_padding_mask": padding, "need_weights": need_weights}
        found, wanted = opened(attention)(x, x, x, **more)[0], attention(x, x, x, **more)[0]
        torch.testing.assert_close(found, wanted, equal_nan=True)


def mixed(attention: nn.Module, x: Tensor) -> Tensor:
    """Once self-attention, once not, and by keyword."""
    return itself(attention, x) + attention(query=x, key=x + 1, value=x)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (itself, ("in_proj",)),
        (lambda a, x: a(x, key=x.sin(), value=x)[0], ("q_proj", "k_proj", "v_proj")),
        (lambda a, x: a(x, *[x.sin()] * 2)[0], ("q_proj", "kv_proj")),
        (lambda a, x: a(*[x.sin()] * 2, value=x)[0], ("qk_proj", "v_proj")),
        (mixed, ("q_proj", "k_proj", "v_proj")),
    ],
)
def test_what_reads_one_tensor_is_one_layer_and_nothing_is_copied(call: Any, names: tuple[str, ...]) -> None:
    attention, x = make_attention(batch_first=True), torch.randn(3, 5, WIDTH)
    with torch.inference_mode():
        wanted = call(attention, x)
        ours = opened(attention, call)
        assert error(call(ours, x), wanted) < LIMITS[torch.float32]
    layers = {name: layer for name, layer in ours.named_modules() if type(layer) is nn.Linear}
    assert tuple(layers) == (*names, "out_proj")
    for kind in ("weight", "bias"):
        whole = torch.cat([getattr(layers[name], kind) for name in names])
        assert torch.equal(whole, getattr(attention, f"in_proj_{kind}"))
    storages = {p.untyped_storage().data_ptr() for p in attention.parameters()}
    assert {p.untyped_storage().data_ptr() for p in ours.parameters()} == storages
    if names == ("in_proj",):
        assert {id(p) for p in ours.parameters()} == {id(p) for p in attention.parameters()}


class Heir(nn.MultiheadAttention):
    """Its forward may be another."""


def hooked() -> nn.MultiheadAttention:
    attention = make_attention()
    attention.register_forward_hook(lambda *_: None)
    return attention


@pytest.mark.parametrize(
    "make",
    [
        partial(make_attention, kdim=WIDTH // 2, vdim=WIDTH),
        partial(make_attention, add_bias_kv=True),
        partial(make_attention, add_zero_attn=True),
        partial(Heir, WIDTH, 2),
        hooked,
        lambda: nn.utils.parametrizations.weight_norm(make_attention(), "in_proj_weight"),
    ],
    ids=["kdim", "bias_k", "zero", "subclass", "hook", "parametrised"],
)
def test_what_is_not_plain_is_left_alone(make: Callable[[], nn.MultiheadAttention]) -> None:
    attention = make()
    narrow = attention.kdim != WIDTH
    assert opened(attention, lambda a, x: a(x, x[..., : WIDTH // 2], x)[0] if narrow else itself(a, x)) is attention


def reads_the_weights(attention: nn.Module, x: Tensor) -> Tensor:
    return itself(attention, x.to(attention.in_proj_weight.dtype))


@pytest.mark.parametrize("call", [lambda a, x: x + 1, reads_the_weights], ids=["never called", "weights are read"])
def test_one_that_the_model_does_not_just_call_is_left_alone(call: Any) -> None:
    attention = make_attention()
    assert opened(attention, call) is attention


def test_a_model_that_is_one_attention_and_one_of_two_names() -> None:
    attention = make_attention(batch_first=True)
    x = torch.randn(2, 5, WIDTH)
    plan, inputs = plan_call((x, x, x), {})
    module = open_attention(FlatModule(attention, plan).eval(), inputs)
    assert isinstance(module.inner, OpenAttention)
    inner: Any = Around(attention, itself)
    inner.again = attention
    inner = open_attention(FlatModule(inner, positional(("x",))).eval(), {"x": x}).inner
    assert inner.again is inner.attention
    assert isinstance(inner.again, OpenAttention)


@pytest.mark.parametrize("strict", [False, True])
def test_an_opened_attention_can_be_exported(strict: bool) -> None:
    module = flat(Vit)
    x = rows()
    wanted = module(x)[0]
    module = open_attention(module, {"x": x})
    with quiet_export():
        shapes = (({0: torch.export.Dim("B", min=2, max=8)},),)
        program = torch.export.export(module, (x,), dynamic_shapes=shapes, strict=strict)
    assert error(program.module()(x)[0], wanted) < LIMITS[torch.float32]
    counts = [n.target for n in program.graph.nodes].count
    assert counts(torch.ops.aten.linear.default) == len(TWO_BLOCKS) + 1
    assert counts(torch.ops.aten.scaled_dot_product_attention.default) == 2


class Encoder(nn.Module):
    """PyTorch's own stack, which would go its fast path over nested tensors."""

    def __init__(self, norm_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, norm_first=norm_first)
        self.stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        answer: Tensor = self.stack(x, src_key_padding_mask=padding)
        return answer.masked_fill(padding.unsqueeze(-1), 0)


@torch.inference_mode()
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("first", [1, 4])  # padding on the right, which becomes nested tensors, and in the middle
def test_an_encoder_of_torch_is_opened_off_its_fast_path(norm_first: bool, first: int) -> None:
    torch.manual_seed(0)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[0, first:5] = True
    padding[:, 5] = first == 1
    inputs = {"x": torch.randn(3, 6, 32), "padding": padding}
    module = FlatModule(Encoder(norm_first), positional(("x", "padding"))).eval()
    wanted = module(*inputs.values())[0]
    module = open_attention(module, inputs)
    assert sum(isinstance(part, OpenAttention) for part in module.modules()) == 2
    assert error(module(*inputs.values())[0], wanted) < 1e-5
    assert len(swapped(fp8_rowwise(module, dataclasses.replace(bench(), inputs=inputs)))) == 8
    assert error(module(*inputs.values())[0], wanted) < 0.1


@torch.inference_mode()
def test_a_decoder_of_torch_is_opened_with_both_of_its_attentions() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(32, 2, 64)
    x, memory = torch.randn(5, 3, 32), torch.randn(7, 3, 32)
    plan, inputs = plan_call((x, memory), {"tgt_is_causal": True, "tgt_mask": torch.ones(5, 5).triu(1) * -1e9})
    module = FlatModule(nn.TransformerDecoder(layer, 1), plan).eval()
    wanted = module(*inputs.values())[0]
    module = fp8_rowwise(module, dataclasses.replace(bench(), inputs=inputs))
    names = ("self_attn.in_proj", "multihead_attn.q_proj", "multihead_attn.kv_proj")
    assert {f"layers.0.{name}" for name in names} < set(swapped(module))
    assert 0.002 < error(module(*inputs.values())[0], wanted) < 0.1


ANY = Scheme("any", lambda gemm: gemm.is_aligned(16, 16), lambda gemm, bound: nn.Identity())


def test_two_layers_a_block_were_compressed_and_now_four_are() -> None:
    x, module = rows(), flat(Vit)
    wanted = module(x)[0]
    assert tuple(find_layers(module, ANY)) == tuple(n for n in TWO_BLOCKS if "attention" not in n)
    module = static_int8_linear(module, bench())
    assert swapped(module) == TWO_BLOCKS
    assert 1e-4 < error(module(x)[0], wanted) < 0.02


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_takes_the_opened_layers(scheme: Any, tmp_path: Path) -> None:
    x, place = rows(), bench()
    module = scheme(apply_transforms(flat(Vit), ["bf16"], dict(place.inputs)), place)
    assert set(TWO_BLOCKS) <= set(swapped(module))
    assert not any(isinstance(part, nn.MultiheadAttention) for part in module.modules())
    loaded = through_a_file(module, x, tmp_path, dynamic=True)
    assert torch.equal(loaded(x[:3])[0], module(x[:3])[0])


def test_layers_of_an_attention_are_kept_where_the_judge_asks_for_it(tmp_path: Path) -> None:
    records: list[Compression] = []
    module = flat(Vit)
    for name in ("blocks.0.attention.in_proj_weight", "blocks.0.attention.in_proj_bias"):
        weights = module.inner.get_parameter(name).view(3, 32, -1)
        weights[2] *= 100  # the values: one product whose error alone is too much
    place = bench(judge=strict_judge(module, 0.03), record=records.append)
    before = {name: (id(p), p.clone()) for name, p in module.named_parameters()}
    x = rows()
    wanted = module(x)[0]
    module = fp8_rowwise(module, place)
    assert records[0].layers == len(TWO_BLOCKS)
    assert any("attention" in name for name in records[0].kept)
    assert swapped(module) == tuple(name for name in TWO_BLOCKS if name not in records[0].kept)
    kept = [module.inner.get_submodule(name) for name in records[0].kept]
    assert {type(layer) for layer in kept} == {nn.Linear}
    assert {id(layer.weight) for layer in kept} < {key for key, _ in before.values()}
    assert error(module(x)[0], wanted) < 0.03
    assert torch.equal(through_a_file(module, x, tmp_path)(x)[0], module(x)[0])


def test_slices_that_are_kept_survive_a_file(tmp_path: Path) -> None:
    call = lambda a, x: a(x, *[x.sin()] * 2)[0]  # noqa: E731
    module = FlatModule(Around(make_attention(batch_first=True), call), positional(("x",))).eval()
    x = torch.randn(2, 5, WIDTH)
    module = open_attention(module, {"x": x})
    saved = through_a_file(module, x, tmp_path)
    torch.testing.assert_close(saved(x)[0], module(x)[0])
    shared = copy_module(module)
    pairs = zip(module.parameters(), shared.parameters(), strict=True)
    assert all(mine is other for mine, other in pairs)


@pytest.mark.skipif(shutil.which("g++") is None, reason="TorchInductor needs g++, which is not here")
def test_inductor_compiles_a_compressed_model(tmp_path: Path) -> None:
    place, x = bench(), rows()
    spec = msgspec.structs.replace(place.spec, outputs=(TensorSpec("y", "float32", ("B", 10)),))
    module = fp8_rowwise(flat(Vit), place)
    wanted = module(x)[0]
    target = Target(Recipe("inductor", transforms=("fp8",), static=True), spec, "cpu", {"B": 4}, tmp_path, tmp_path)
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    backend = get_backend("inductor")
    backend.build(module, {"x": x}, artifact, target)
    runner = backend.load(artifact, target)
    assert error(runner({"x": x})["y"], wanted) < 0.02  # an activation may round to the next code
    runner.close()

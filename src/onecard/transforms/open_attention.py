"""Opening ``nn.MultiheadAttention``: the same attention made of plain linear layers, which can then be compressed.

PyTorch's own module reads the weights of its four projections itself, so nothing can be put in the place of one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from onecard.models.flat import FlatModule
from onecard.transforms import watch

_ROLES = ("query", "key", "value")
_BATCHED = 3  # dimensions of a query; a single row has two

PROJECTIONS: dict[tuple[bool, bool], dict[str, tuple[int, ...]]] = {
    (True, True): {"in_proj": (0, 1, 2)},
    (False, True): {"q_proj": (0,), "kv_proj": (1, 2)},
    (True, False): {"qk_proj": (0, 1), "v_proj": (2,)},
    (False, False): {"q_proj": (0,), "k_proj": (1,), "v_proj": (2,)},
}
"""The layers of an opened attention and which of query, key and value each projects, by whether the query is the key
and the key is the value: what reads one tensor is one product."""


def open_attention(module: FlatModule, inputs: Mapping[str, Tensor]) -> FlatModule:
    """Put an :class:`OpenAttention` in the place of every ``nn.MultiheadAttention`` that a run calls.

    Left as they are: subclasses, modules with keys and values of another width, added keys (``bias_k``,
    ``add_zero_attn``), hooks or parametrised weights, and those whose weights the model reads itself.

    Args:
        module: in evaluation mode; the caller gives it up. The layers share its weights' memory.
        inputs: example inputs by name, on the module's device; run twice if there is anything to open.

    Returns:
        The module. If it was opened, its encoder layers no longer take their fast path (:func:`leave_fast_path`).
    """
    found = [layer for layer in module.modules() if _can_be_opened(layer)]
    if not found:
        return module
    leave_fast_path(module)
    with watch.exact_run():
        made = {layer: OpenAttention(layer, PROJECTIONS[same]).eval() for layer, same in _watch(module, inputs, found)}
        places = [(name, layer) for name, layer in module.named_modules(remove_duplicate=False) if layer in made]
        for name, layer in places:
            module.set_submodule(name, made[layer])
        try:
            watch.run(module, inputs)
        except Exception:  # the model's own code misses the weights that were there
            for name, layer in places:
                module.set_submodule(name, layer)
    return module


def leave_fast_path(module: nn.Module) -> None:
    """Make PyTorch's encoders call their layers, in place: their fast path reads the weights of all layers itself.

    Without it ``nn.TransformerEncoder`` has values in padded places, where it had zeros, as in any compiled graph.
    """
    for part in module.modules():
        if isinstance(part, nn.TransformerEncoderLayer):
            part.activation_relu_or_gelu = 0
        elif isinstance(part, nn.TransformerEncoder):
            part.use_nested_tensor = False


class OpenAttention(nn.Module):
    """Multi-head attention as ``nn.MultiheadAttention`` has it in evaluation mode, over ``nn.Linear`` layers.

    Args:
        attention: its weights are shared, not copied.
        projections: the layers in front, a value of :data:`PROJECTIONS`. Any of them gives the right answers for
            any call; one layer for several tensors computes more than it needs to.
    """

    in_proj_bias = None  # nn.TransformerEncoderLayer looks at it before anything that keeps it off its fast path

    def __init__(self, attention: nn.MultiheadAttention, projections: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = attention.embed_dim, attention.num_heads
        self.batch_first = attention.batch_first
        self.projections = dict(projections)
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        assert weight is not None  # without it an attention is not opened
        for name, roles in projections.items():
            low, high = roles[0] * self.embed_dim, (roles[-1] + 1) * self.embed_dim
            self.add_module(name, _linear(_rows(weight, low, high), None if bias is None else _rows(bias, low, high)))
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)

    def forward(  # noqa: PLR0913, PLR0917 - the signature of nn.MultiheadAttention
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, with heads H and embedding E.

        Args:
            query: ``[B, L, E]`` if ``batch_first``, else ``[L, B, E]``; ``[L, E]`` for a single row.
            key: ``[B, S, E]``, ``[S, B, E]`` or ``[S, E]``.
            value: as ``key``.
            key_padding_mask: ``[B, S]`` or ``[S]``; bool (True is left out) or floating (added to the logits).
            need_weights: also give the attention weights.
            attn_mask: ``[L, S]`` or ``[B * H, L, S]``, bool or floating likewise.
            average_attn_weights: the weights' mean over the heads.
            is_causal: ``attn_mask`` is the causal mask, which is taken on trust.

        Returns:
            The answer in the query's shape, and the weights ``[B, L, S]`` (``[B, H, L, S]`` if not averaged; without
            B for a single row) or None.

        Raises:
            RuntimeError: ``is_causal`` without ``attn_mask``.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal says that attn_mask is the causal mask, and there is no attn_mask")
        is_causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if is_causal else self._merge_masks(attn_mask, key_padding_mask, query.dtype)
        q, k, v = (self._split_heads(part) for part in self._project(query, key, value))  # [B, H, L or S, E / H]
        if not need_weights:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal)
            return self._join_heads(mixed, query.dim()), None
        weights = _attention_weights(q, k, mask)  # [B, H, L, S]
        answer = self._join_heads(weights @ v, query.dim())
        weights = weights.mean(1) if average_attn_weights else weights
        return answer, weights if query.dim() == _BATCHED else weights.squeeze(0)

    def _project(self, *tensors: Tensor) -> list[Tensor]:
        """Query, key and value after their projection, each in its own shape."""
        parts: list[Tensor] = []
        for name, roles in self.projections.items():
            layer, sources = getattr(self, name), [tensors[role] for role in roles]
            if all(source is sources[0] for source in sources):
                parts += layer(sources[0]).chunk(len(roles), -1)
            else:
                parts += [layer(source).chunk(len(roles), -1)[index] for index, source in enumerate(sources)]
        return parts

    def _split_heads(self, x: Tensor) -> Tensor:
        heads = x.reshape(*x.shape[:-1], self.num_heads, -1)  # [(B, L) or (L, B) or L, H, E / H]
        if x.dim() != _BATCHED:
            heads = heads.unsqueeze(0)
        elif not self.batch_first:
            heads = heads.transpose(0, 1)
        return heads.transpose(1, 2)

    def _join_heads(self, x: Tensor, dims: int) -> Tensor:
        """``[B, H, L, E / H]`` through the last layer, in the layout of a query of so many dimensions."""
        rows = x.transpose(1, 2).flatten(2)  # [B, L, E]
        if dims != _BATCHED:
            rows = rows.squeeze(0)
        elif not self.batch_first:
            rows = rows.transpose(0, 1).contiguous()  # models call view() on what comes out
        answer: Tensor = self.out_proj(rows)
        return answer

    def _merge_masks(self, mask: Tensor | None, padding: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """What is added to the logits: ``[B or 1, H or 1, L or 1, S]``."""
        padding = F._canonical_mask(padding, "key_padding_mask", F._none_or_dtype(mask), "attn_mask", dtype)
        mask = F._canonical_mask(mask, "attn_mask", None, "", dtype, check_other=False)
        if mask is not None:
            mask = mask.reshape(-1, self.num_heads, *mask.shape[-2:]) if mask.dim() == _BATCHED else mask[None, None]
        if padding is None:
            return mask
        padding = padding.reshape(-1, 1, 1, padding.shape[-1])
        return padding if mask is None else mask + padding


def _attention_weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    logits = (q * math.sqrt(1.0 / q.shape[-1])) @ k.transpose(-2, -1)
    return torch.softmax(logits if mask is None else logits + mask, -1)


def _linear(weight: Any, bias: Any) -> nn.Linear:
    """A layer over these parameters."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight, linear.bias = weight, bias
    return linear


def _rows(parameter: nn.Parameter, low: int, high: int) -> nn.Parameter:
    """The parameter itself, or a view of some of its rows."""
    return parameter if high - low == len(parameter) else nn.Parameter(parameter.detach()[low:high], False)


def _can_be_opened(layer: nn.Module) -> bool:
    if type(layer) is not nn.MultiheadAttention or not layer._qkv_same_embed_dim:
        return False
    if layer.bias_k is not None or layer.bias_v is not None or layer.add_zero_attn:
        return False
    if type(layer.out_proj) is not NonDynamicallyQuantizableLinear or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    tensors = (layer.in_proj_weight, layer.in_proj_bias, layer.out_proj.weight, layer.out_proj.bias)
    return all(tensor is None or type(tensor) is nn.Parameter for tensor in tensors)


def _watch(
    module: FlatModule, inputs: Mapping[str, Tensor], found: list[nn.Module]
) -> list[tuple[nn.MultiheadAttention, tuple[bool, bool]]]:
    """The attentions that a run calls, each with whether its query is its key and its key its value, in all calls."""
    same: dict[nn.Module, tuple[bool, bool]] = {}

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        query, key, value = (*args[:3], *(kwargs[role] for role in _ROLES[len(args) :]))
        before = same.get(layer, (True, True))
        same[layer] = before[0] and query is key, before[1] and key is value

    def hooks(stack: ExitStack) -> None:
        for layer in found:
            stack.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)

    watch.watch(module, inputs, hooks)
    return [(layer, pair) for layer, pair in same.items() if isinstance(layer, nn.MultiheadAttention)]

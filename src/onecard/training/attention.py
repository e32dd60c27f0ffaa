"""Attention modules made of separate query, key and value layers, whose heads can be removed one by one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

_HEADS = ("num_attention_heads", "num_heads", "n_heads")
_TOTALS = ("all_head_size", "attention_dim", "inner_dim")
_PROJECTIONS = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin"))


@dataclass(frozen=True)
class Attention:
    """One attention of as many key heads as query heads.

    Args:
        module: it keeps the number of heads in an attribute.
        layers: the query, key and value projections.
        head_size: channels of a head, which do not change.
    """

    module: nn.Module
    layers: tuple[nn.Linear, nn.Linear, nn.Linear]
    head_size: int

    @property
    def projections(self) -> set[nn.Module]:
        return set(self.layers)

    def count_heads(self) -> None:
        """Set the module's own numbers to what its layers hold."""
        total = self.layers[0].out_features
        for name in _HEADS:
            if isinstance(getattr(self.module, name, None), int):
                setattr(self.module, name, total // self.head_size)
        for name in _TOTALS:
            if isinstance(getattr(self.module, name, None), int):
                setattr(self.module, name, total)


def find_attentions(module: nn.Module) -> list[Attention]:
    """The attentions of a model that name their parts as the transformers library does."""
    found = []
    for child in module.modules():
        heads = next((n for name in _HEADS if isinstance(n := getattr(child, name, None), int)), 0)
        for names in _PROJECTIONS:
            layers = [getattr(child, name, None) for name in names]
            query, key, value = layers
            if not (isinstance(query, nn.Linear) and isinstance(key, nn.Linear) and isinstance(value, nn.Linear)):
                continue
            sizes = {query.out_features, key.out_features, value.out_features}
            if heads and len(sizes) == 1 and query.out_features % heads == 0:
                found.append(Attention(child, (query, key, value), query.out_features // heads))
    return found

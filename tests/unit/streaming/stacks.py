"""Small models with what streaming must get right: tied weights, shared layers, buffers, weights that go far."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY, WIDTH, LENGTH = 300, 32, 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:  # [B, S, W]
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, 4, WIDTH // 4)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.second(x))))


class Decoder(nn.Module):
    """Tied embeddings, a rope-like buffer that every layer uses, and a constant made in forward."""

    def __init__(self, depth: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("places", torch.randn(LENGTH, WIDTH), persistent=False)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids) * torch.tensor(0.5)
        for block in self.blocks:
            x = block(x + self.places[: ids.shape[1]])
        return {"logits": self.head(x), "state": x[:, -1]}


class TiedCnn(nn.Module):
    """One convolution used at both ends, in channels-last layout, with batch norms and an operator in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.shared = nn.Conv2d(16, 16, 3, padding=1)
        self.body = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True)) for _ in "abcd")
        )
        self.to(memory_format=torch.channels_last)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = self.shared(self.stem(image))
        y = self.body(x)
        return self.shared(y), x.mean((2, 3))


def decoder(depth: int = 6) -> Decoder:
    torch.manual_seed(0)
    return Decoder(depth).eval()


def tied_cnn() -> TiedCnn:
    torch.manual_seed(0)
    return TiedCnn().eval()


def ids(rows: int = 2) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(rows))


def weight_bytes(module: nn.Module) -> int:
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))

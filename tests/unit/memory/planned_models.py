"""Small models whose memory can be counted by hand, and two real ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

ROW = 1024
ROW_BYTES = 4 * ROW
VECTOR = f"x: float32[B,{ROW}], B=1..64"
IMAGE = "image: float32[B,3,64,64], B=1..16"
TOKENS = ("input_ids: int64[B,S] in 0..99, B=1..8, S=2..64", "attention_mask: int64[B,S]")


class Chain(nn.Module):
    """Each tensor is needed by the next one only."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        x = x * 2
        return x.exp()


class Residual(nn.Module):
    """The first tensor is needed at the end; Python holds all of them."""

    def forward(self, x: Tensor) -> Tensor:
        a = x + 1
        b = a * 2
        c = b * 3
        return a + c


class View(nn.Module):
    """Views are of their base's memory, and keep it."""

    def forward(self, x: Tensor) -> Tensor:
        a = (x + 1).view(-1, 2)
        return a.t()[0] * 2


class InPlace(nn.Module):
    """One tensor, changed twice."""

    def forward(self, x: Tensor) -> Tensor:
        a = x + 1
        a.relu_()
        return a.mul_(2)


class Branch(nn.Module):
    """Three tensors that are alive together."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x + 1, x + 2, x + 3], 1)


class Several(nn.Module):
    """Two answers with memory of their own, one that is a view of another, and one that is the input."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        a = x + 1
        return a, a * 2, a[:, :4], x


class Tied(nn.Module):
    """Two layers with one weight, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(ROW, ROW, bias=False)
        self.second = nn.Linear(ROW, ROW, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.zeros(ROW))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + self.shift


class Asks(nn.Module):
    """Its code looks into a tensor, so that shapes alone do not tell what it does."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if float(x.sum()) > 0 else x + 1


class Block(nn.Module):
    """Two convolutions and what goes around them."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.down = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return torch.relu(y + self.down(x))


class ResNet(nn.Module):
    """A small one, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )
        self.layers = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
        self.head = nn.Linear(64, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(image)).mean((2, 3)))


def tiny_bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=100)
    )

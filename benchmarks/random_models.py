"""Models with random weights whose answers are of an ordinary size.

A deep network with fresh batch norms (mean 0, variance 1) shrinks its signal layer by layer: MobileNetV3's answers are
about 1e-9, which fp16 cannot hold. A trained network does not, since its norms know their inputs; so here they are
measured on random pictures first.
"""

from __future__ import annotations

import torch
from torch import nn

_PICTURES, _SIDE = 16, 224


def mobilenet_v3_small() -> nn.Module:
    """Torchvision's MobileNetV3-small."""
    from torchvision.models import mobilenet_v3_small as make

    return _with_measured_norms(make)


def vit_b_16() -> nn.Module:
    """Torchvision's ViT-B/16; its own initialisation has a head of zeros, so every answer would be zero."""
    from torchvision.models import vit_b_16 as make

    torch.manual_seed(0)
    model: nn.Module = make(weights=None)
    nn.init.normal_(model.heads.head.weight, std=0.02)
    return model.eval()


def small_cnn() -> nn.Module:
    """One convolution, to try a benchmark on a CPU."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    ).eval()


def _with_measured_norms(make) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
        torch.manual_seed(0)
        model: nn.Module = make(weights=None)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        model.train()
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.eval()
        model(torch.randn(_PICTURES, 3, _SIDE, _SIDE))
    return model.eval()


def pictures() -> tuple[dict[str, torch.Tensor], None]:
    """Data for LoadGen without labels: 64 random pictures, float32 [64,3,224,224]."""
    return {"image": torch.randn(64, 3, _SIDE, _SIDE, generator=torch.Generator().manual_seed(0))}, None

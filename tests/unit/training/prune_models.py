"""Small networks of the kinds whose channels depend on each other, and their probes."""

import torch
from torch import Tensor, nn

from onecard.models.live import load_live
from onecard.models.model import Model
from onecard.models.probe import probe_sizes, sample_inputs
from onecard.models.request import Request

IMAGE = "image: float32[B,3,8,8], B=1..16"
ROWS = "rows: float32[B,8], B=1..16"
IDS = "ids: int64[B,S] in 0..49, B=1..8, S=2..16"


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU())
        self.one = nn.Conv2d(24, 32, 3, padding=1)
        self.two = nn.Sequential(nn.Conv2d(32, 24, 3, padding=1), nn.BatchNorm2d(24))
        self.head = nn.Linear(24, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        return self.head(torch.relu(x + self.two(torch.relu(self.one(x)))).mean((2, 3)))


class Depthwise(nn.Module):
    """Depthwise, pointwise and grouped convolutions, a squeeze and excitation, a flattened head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.gate = nn.Conv2d(32, 32, 1)
        self.pointwise = nn.Conv2d(32, 24, 1)
        self.grouped = nn.Conv2d(24, 24, 3, groups=4)
        self.head = nn.Linear(24 * 6 * 6, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.depthwise(self.stem(image)))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.head(self.grouped(torch.sigmoid(self.pointwise(x))).flatten(1))


class Branches(nn.Module):
    """A gated unit that splits its channels, and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.left = nn.Conv2d(16, 24, 3, padding=1)
        self.joined = nn.Conv2d(40, 32, 3)
        self.head = nn.Linear(32, 4)

    def forward(self, image: Tensor) -> Tensor:
        value, gate = self.stem(image).chunk(2, 1)
        x = value * torch.sigmoid(gate)
        return self.head(torch.relu(self.joined(torch.cat([self.left(x), x], 1))).mean((2, 3)))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layers(self.words(ids)).mean(1))


class TwoOutputs(nn.Module):
    """What comes before the second output is used further, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 32)
        self.features = nn.Linear(32, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(torch.relu(self.first(rows)))
        return self.head(torch.relu(features)), features


class Mixed(nn.Module):
    """A softmax over channels: without one of them the others change."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 32)
        self.second = nn.Linear(32, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(torch.softmax(self.second(torch.relu(self.first(rows))), 1))


class Fixed(nn.Module):
    """Its forward has a number of channels written into it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 32)
        self.second = nn.Linear(32, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, rows: Tensor) -> Tensor:
        x = torch.relu(self.first(rows)).reshape(-1, 2, 16).transpose(1, 2).reshape(-1, 32)
        return self.head(torch.relu(self.second(x)))


class Bare(nn.Module):
    """Nothing but arithmetic."""

    def forward(self, rows: Tensor) -> Tensor:
        return rows.cumsum(1)


def model_of(kind: type[nn.Module], spec: str) -> Model:
    torch.manual_seed(0)
    module = kind()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return load_live(module, Request((spec,)))


def probes_of(model: Model) -> list[tuple[Tensor, ...]]:
    return [tuple(sample_inputs(model.spec, sizes)) for sizes in probe_sizes(model.spec)]

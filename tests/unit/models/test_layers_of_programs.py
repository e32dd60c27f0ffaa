"""Exported programs have layers again, with the same answers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from onecard.models.exported import flat_program


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False),
            nn.BatchNorm2d(8, eps=1e-3),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.shared = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5, bias=False)
        self.bare = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.shared(torch.relu(self.shared(self.features(x))))
        return nn.functional.linear(self.head(y), self.bare)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    net(torch.randn(8, 3, 16, 16))  # running statistics that are not the identity
    return net.eval()


def restored(net: nn.Module) -> nn.Module:
    batch = torch.export.Dim("B", min=1, max=8)
    return flat_program(torch.export.export(net, (torch.randn(2, 3, 16, 16),), dynamic_shapes=({0: batch},)))


def test_layers_are_modules_with_their_names_and_settings(net: nn.Module):
    layers = dict(restored(net).named_modules())
    assert isinstance(layers["features.0"], nn.Conv2d)
    assert layers["features.0"].stride == (2, 2)
    assert layers["features.0"].bias is None
    assert isinstance(layers["features.1"], nn.BatchNorm2d)
    assert layers["features.1"].eps == 1e-3
    assert layers["features.3"].groups == 8
    assert isinstance(layers["shared"], nn.Linear)
    assert isinstance(layers["head"], nn.Linear)


@pytest.mark.parametrize("rows", [1, 3])
def test_answers_do_not_change(net: nn.Module, rows: int):
    x = torch.randn(rows, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(restored(net)(x)[0], net(x))


def test_a_restored_program_can_be_exported_again(net: nn.Module):
    x = torch.randn(2, 3, 16, 16)
    again = torch.export.export(restored(net), (x,), dynamic_shapes=({0: torch.export.Dim("B", min=1, max=8)},))
    assert torch.allclose(again.module()(torch.cat([x, x]))[0][:2], net(x), atol=1e-6)


def test_a_parameter_without_a_layer_stays_an_operator(net: nn.Module):
    graph = restored(net)
    assert "aten.linear.default" in {str(n.target) for n in graph.graph.nodes}
    assert torch.equal(graph.bare, net.bare)


def test_a_norm_in_training_mode_is_left_alone():
    norm = nn.BatchNorm1d(4).train()
    graph = flat_program(torch.export.export(norm, (torch.randn(3, 4),)))
    assert not [m for m in graph.modules() if isinstance(m, nn.BatchNorm1d)]

"""Folding batch norm keeps the answers, removes the norms, and refuses where it cannot."""

import copy

import pytest
import torch
from torch import Tensor, nn

from onecard.errors import Unsupported
from onecard.models.flat import FlatModule, positional
from onecard.transforms import apply_transforms


def flat(model: nn.Module) -> FlatModule:
    """A module in evaluation mode whose norms have statistics that matter."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            if module.affine:
                nn.init.normal_(module.weight, 1.0)
                nn.init.normal_(module.bias)
    return FlatModule(model, positional(("x",))).eval()


def norms(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def fold(module: FlatModule, x: Tensor) -> FlatModule:
    return apply_transforms(copy.deepcopy(module), ["fold_bn"], {"x": x})


SHAPES = {
    "conv1d": (nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU()), (2, 3, 9)),
    "conv2d": (nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), (2, 3, 9, 9)),
    "conv3d": (nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4)), (2, 3, 5, 5, 5)),
    "grouped": (nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8)), (2, 4, 9, 9)),
    "linear": (nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), (2, 5)),
    "not affine": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)), (2, 3, 9, 9)),
}


@pytest.mark.parametrize("name", SHAPES)
@torch.inference_mode()
def test_answers_stay_and_the_norm_goes(name):
    model, shape = SHAPES[name]
    module, x, other = flat(model), torch.randn(shape), torch.randn(shape)
    folded = fold(module, x)
    assert not norms(folded)
    torch.testing.assert_close(folded(other), module(other), rtol=1e-4, atol=1e-5)


class Residual(nn.Module):
    """Not traceable, a norm behind an addition, and a convolution whose norm is used as usual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.after = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return self.after(y + x) if float(y.sum()) < 1e9 else y


@torch.inference_mode()
def test_only_a_norm_right_behind_a_layer_is_folded():
    module, x = flat(Residual()), torch.randn(2, 4, 8, 8)
    folded = fold(module, x)
    assert norms(folded) == [folded.inner.after]
    torch.testing.assert_close(folded(x), module(x), rtol=1e-4, atol=1e-5)


class UsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


def test_a_layer_whose_output_is_used_twice_is_refused():
    with pytest.raises(Unsupported, match="output is used twice"):
        fold(flat(UsedTwice()), torch.randn(2, 3, 8, 8))


class CalledTwice(nn.Module):
    """One convolution before two norms: it cannot hold both."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            x = norm(self.conv(x))
        return x


NOTHING = {
    "no norm": nn.Conv2d(3, 4, 3),
    "norm first": nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)),
    "something between": nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)),
    "statistics of the batch": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
    "layer called twice": CalledTwice(),
}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_to_fold_is_refused(name):
    with pytest.raises(Unsupported, match="no batch normalisation right behind"):
        fold(flat(NOTHING[name]), torch.randn(2, 3, 8, 8))

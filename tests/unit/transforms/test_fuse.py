"""Folding batch norm keeps the answers, removes the norms, and refuses where it cannot."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

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
    with pytest.raises(Unsupported, match="a tensor is also used somewhere unseen"):
        fold(flat(UsedTwice()), torch.randn(2, 3, 8, 8))


class Changed(nn.Module):
    """What is between layer and norm changes the layer's own answer, on the example maybe by nothing."""

    def __init__(self, change) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.change(y)
        return self.norm(y)


class Scaling(nn.Module):
    """A model that changes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.mul_(2))


@pytest.mark.parametrize("inference", [False, True])
def test_the_caller_s_inputs_stay_as_they_are(inference):
    with torch.inference_mode(inference):
        module, x = flat(Scaling()), torch.randn(2, 3, 8, 8)
        before = x.clone()
        folded = fold(module, x)
        assert not norms(folded)
        assert torch.equal(x, before)
        torch.testing.assert_close(folded(x.clone()), module(x.clone()), rtol=1e-4, atol=1e-5)


class Odd(nn.Module):
    """A pair like any other, and one that cannot be folded."""

    def __init__(self, *odd: nn.Module, shape: tuple[int, ...] = (-1, 4, 6, 6)) -> None:
        super().__init__()
        self.plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.odd = nn.Sequential(*odd)
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return self.odd(self.plain(x).view(self.shape))


class ActivatedNorm(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class TwoNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norms[0](y) + self.norms[1](y).relu()


def hooked() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    norm.register_forward_hook(lambda module, args, answer: answer.relu())
    return norm


@torch.no_grad()  # else it could not be copied
def pruned() -> nn.Module:
    return prune.l1_unstructured(nn.Conv2d(4, 4, 3), "weight", 0.5)


ODD = {
    "channels elsewhere": Odd(nn.Linear(6, 4), nn.BatchNorm1d(4), shape=(-1, 4, 6)),
    "channels elsewhere, another number": Odd(nn.Linear(6, 7), nn.BatchNorm1d(4), shape=(-1, 4, 6)),
    "pruned": Odd(pruned(), nn.BatchNorm2d(4)),
    "weight norm": Odd(weight_norm(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4)),
    "a norm of its own class": Odd(nn.Conv2d(4, 4, 3), ActivatedNorm(4)),
    "a norm with a hook": Odd(nn.Conv2d(4, 4, 3), hooked()),
    "two norms": Odd(TwoNorms()),
    "changed in place": Odd(Changed(lambda y: y.clamp_(min=-1)), shape=(-1, 3, 6, 8)),
}


@pytest.mark.parametrize("name", ODD)
@torch.no_grad()
def test_the_other_pairs_of_a_model_with_an_odd_one_are_folded(name):
    module, x, other = flat(ODD[name]), torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    folded = fold(module, x)
    assert isinstance(folded.inner.plain[1], nn.Identity)
    assert len(norms(folded)) == len(norms(module)) - 1
    torch.testing.assert_close(folded(other), module(other), rtol=1e-4, atol=1e-5)


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.last = self.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.conv(x))


def test_a_norm_goes_under_all_its_names():
    module, x = flat(TwoNames()), torch.randn(2, 3, 8, 8)
    folded = fold(module, x)
    assert not norms(folded)
    torch.testing.assert_close(folded(x), module(x), rtol=1e-4, atol=1e-5)


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
    "masked in place": Changed(lambda y: y.masked_fill_(torch.zeros(6, 6, dtype=torch.bool), 0.0)),
    "clamped in place": Changed(lambda y: y.clamp_(-1e9, 1e9)),
    "changed through a view": Changed(lambda y: y[:, :, :0].zero_()),
}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_to_fold_is_refused(name):
    with pytest.raises(Unsupported, match="no batch normalisation right behind"):
        fold(flat(NOTHING[name]), torch.randn(2, 3, 8, 8))

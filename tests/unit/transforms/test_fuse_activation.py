"""An activation behind a layer becomes part of it, exactly; every other activation still acts."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import profile

from onecard.backends.export import quiet_export
from onecard.errors import Unsupported
from onecard.models.exported import export_flat, flat_program
from onecard.models.flat import FlatModule, positional
from onecard.spec import parse_spec
from onecard.transforms import apply_transforms
from onecard.transforms.fuse_activation import ActivatedLayer, SkippedActivation

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")


class ExactGelu(nn.Module):
    """As transformers writes it: a class of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5 * (1.0 + torch.erf(x / 2**0.5))


class TanhGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def flat(model: nn.Module) -> FlatModule:
    return FlatModule(model, positional(("x",))).eval()


def fuse(module: FlatModule, x: Tensor, *names: str) -> FlatModule:
    return apply_transforms(copy.deepcopy(module), names or ["fuse_activation"], {"x": x})


def fused_kinds(module: nn.Module) -> list[str]:
    return [m.kind for m in module.modules() if isinstance(m, ActivatedLayer)]


def operators(module: nn.Module, x: Tensor) -> set[str]:
    with torch.inference_mode(), profile() as profiler:
        module(x)
    return {event.key for event in profiler.key_averages()}


ACTIVATIONS = {
    "relu": nn.ReLU(inplace=True),
    "relu6": nn.ReLU6(),
    "gelu": ExactGelu(),
    "gelu_tanh": TanhGelu(),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
@torch.inference_mode()
def test_each_activation_is_known_by_what_it_does(kind):
    torch.manual_seed(0)
    linear = flat(nn.Sequential(nn.Linear(16, 32), ACTIVATIONS[kind], nn.Linear(32, 4)))
    x, other = 4 * torch.randn(3, 16), 4 * torch.randn(2, 5, 16)
    fused = fuse(linear, x)
    assert fused_kinds(fused) == [kind]
    torch.testing.assert_close(fused(other), linear(other), rtol=1e-5, atol=1e-5)
    conv = flat(nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2, bias=False), ACTIVATIONS[kind]))
    image = 4 * torch.randn(2, 4, 9, 9)
    fused = fuse(conv, image)
    assert fused_kinds(fused) == [kind]
    torch.testing.assert_close(fused(image), conv(image), rtol=1e-5, atol=1e-5)


class Residual(nn.Module):
    """One activation used three times: behind a layer, behind a sum in place, and on its own."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.act = activation

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.first(x)))
        y = self.second(y)
        y += x
        return self.act(y) if float(y.sum()) < 1e9 else self.act(x)


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.SiLU()], ids=["relu in place", "silu"])
@torch.inference_mode()
def test_a_shared_activation_is_left_out_only_behind_its_layer(activation):
    module, x = flat(Residual(activation)), torch.randn(2, 4, 8, 8)
    nn.init.normal_(module.inner.norm.running_mean)
    fused = fuse(module, x, "fold_bn", "fuse_activation")
    assert isinstance(fused.inner.first, ActivatedLayer)
    assert isinstance(fused.inner.second, nn.Conv2d)
    assert isinstance(fused.inner.act, SkippedActivation)
    other = torch.randn(3, 4, 8, 8)
    torch.testing.assert_close(fused(other.clone()), module(other.clone()), rtol=1e-4, atol=1e-5)


class PaddedConv(nn.Conv2d):
    """A class of its own that pads on one side first, as TensorFlow does."""

    def __init__(self) -> None:
        super().__init__(3, 8, 3, stride=2)
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.pad(x), self.weight, self.bias, self.stride)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.5


@torch.inference_mode()
def test_a_layer_class_of_its_own_is_tried_before_it_is_trusted():
    module, x = flat(nn.Sequential(PaddedConv(), nn.ReLU6())), torch.randn(2, 3, 8, 8)
    fused = fuse(module, x)
    assert fused_kinds(fused) == ["relu6"]
    torch.testing.assert_close(fused(x), module(x))
    with pytest.raises(Unsupported, match="no fused kernel here for Scaled with relu"):
        fuse(flat(nn.Sequential(Scaled(4, 4), nn.ReLU())), torch.randn(2, 4))


def test_it_is_one_kernel_where_it_says_so():
    module, x = flat(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6())), torch.randn(1, 3, 8, 8)
    assert "aten::hardtanh" in operators(module, x)
    found = operators(fuse(module, x), x)
    assert "mkldnn::_convolution_pointwise" in found
    assert "aten::hardtanh" not in found


@torch.inference_mode()
def test_casts_autocast_hooks_and_replaced_layers_still_activate_once():
    module = flat(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)))
    x = torch.randn(3, 16)
    want = module(x)[0]
    for names in (("bf16",), ("autocast_bf16",), ("fp16",)):
        torch.testing.assert_close(fuse(module, x, "fuse_activation", *names)(x)[0], want, rtol=0.05, atol=0.05)
    fused = fuse(module, x)
    seen = []
    hook = fused.inner[0].layer.register_forward_hook(lambda m, a, y: seen.append(y))
    torch.testing.assert_close(fused(x)[0], want)
    assert seen  # an observer sees the layer's own answer
    hook.remove()
    fused.inner[0].layer = nn.Sequential(fused.inner[0].layer)
    torch.testing.assert_close(fused(x)[0], want)


def test_a_graph_gets_layer_and_activation_apart():
    module, x = flat(nn.Sequential(nn.Linear(16, 32), nn.GELU())), torch.randn(3, 16)
    fused = fuse(module, x)
    with quiet_export():
        program = torch.export.export(fused, (x,), strict=False)
    assert {str(n.target) for n in program.graph.nodes if n.op == "call_function"} == {
        "aten.linear.default",
        "aten.gelu.default",
    }
    torch.testing.assert_close(program.module()(x), module(x))


class Functional(nn.Module):
    """Activations that are no modules: found once the model is an exported graph."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.linear(F.relu_(self.conv(x)).mean((2, 3))), approximate="tanh")


@torch.no_grad()
def test_the_activations_of_an_exported_graph_are_found():
    module = flat(Functional())
    program, _, _ = export_flat(module, parse_spec(["x: float32[B,3,8,8], B=1..8"]))
    graph = flat(flat_program(program))
    x = torch.randn(2, 3, 8, 8)
    fused = fuse(graph, x)
    assert fused_kinds(fused) == ["relu", "gelu_tanh"]
    torch.testing.assert_close(fused(x), module(x), rtol=1e-5, atol=1e-6)


class UsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(8, 8), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return self.act(y) + y


REFUSED = {
    "functional": (Functional(), (2, 3, 8, 8), "no activation module right behind"),
    "norm between": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), (2, 3, 8, 8), "no activation"),
    "unknown": (nn.Sequential(nn.Linear(8, 8), nn.ELU()), (2, 8), "no activation module right behind"),
    "used twice": (UsedTwice(), (2, 8), "fusing activations changes the answers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_fused_is_refused(name):
    model, shape, reason = REFUSED[name]
    with pytest.raises(Unsupported, match=reason) as caught:
        fuse(flat(model), torch.randn(shape))
    assert ("fold_bn" in caught.value.cure) == (name == "norm between")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_on_a_card_relu_and_tanh_gelu_are_fused_and_exact_gelu_is_not(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 32), nn.ReLU())
    tail = (nn.Linear(32, 32), nn.GELU(approximate="tanh"), nn.Linear(32, 32), nn.GELU())
    module, x = flat(nn.Sequential(*model, *tail)).cuda(), torch.randn(2, 4, 8, 8, device="cuda")
    fused = fuse(module, x, "fuse_activation", dtype)
    assert fused_kinds(fused) == ["relu", "relu", "gelu_tanh"]
    with torch.inference_mode():
        torch.testing.assert_close(fused(x), module(x), rtol=2e-2, atol=2e-2)

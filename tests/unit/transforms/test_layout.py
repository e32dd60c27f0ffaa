"""Channels-last changes how weights and activations lie, never the answers or their layout."""

import copy

import pytest
import torch
from torch import Tensor, nn

from onecard.errors import Unsupported
from onecard.models.flat import FlatModule, positional
from onecard.transforms import apply_transforms


class Watching(nn.Module):
    """Two inputs, of which only the picture has channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.saw_channels_last = False

    def forward(self, image: Tensor, scale: Tensor) -> Tensor:
        self.saw_channels_last = image.is_contiguous(memory_format=torch.channels_last)
        return self.conv(image) * scale


@torch.inference_mode()
def test_layout_changes_inside_and_answers_stay():
    torch.manual_seed(0)
    module = FlatModule(Watching(), positional(("image", "scale"))).eval()
    inputs = {"image": torch.randn(2, 3, 8, 8), "scale": torch.tensor(2.0)}
    changed = apply_transforms(copy.deepcopy(module), ["channels_last"], inputs)
    answer = changed(*inputs.values())[0]
    assert changed.inner.saw_channels_last
    assert changed.inner.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert answer.is_contiguous()
    torch.testing.assert_close(answer, module(*inputs.values())[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", [nn.Linear(3, 4), nn.Conv1d(3, 4, 3)], ids=["linear", "conv1d"])
def test_a_model_without_2d_convolutions_is_refused(model):
    with pytest.raises(Unsupported, match="no 2-D convolution"):
        apply_transforms(FlatModule(model, positional(("x",))), ["channels_last"], {})


class Mixed(nn.Module):
    """Beside its 2-D convolution, a 3-D one, whose weight has five dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.deep = nn.Conv2d(3, 4, 3), nn.Conv3d(4, 4, (1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.deep(self.flat(x).unsqueeze(2))


@torch.inference_mode()
def test_tensors_of_other_dimensions_stay_as_they_are():
    module, x = FlatModule(Mixed(), positional(("x",))).eval(), torch.randn(2, 3, 8, 8)
    changed = apply_transforms(copy.deepcopy(module), ["channels_last"], {"x": x})
    assert changed.inner.flat.weight.is_contiguous(memory_format=torch.channels_last)
    assert changed.inner.deep.weight.is_contiguous()
    torch.testing.assert_close(changed(x), module(x), rtol=1e-4, atol=1e-5)

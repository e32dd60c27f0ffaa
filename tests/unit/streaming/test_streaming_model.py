"""The Python face: budgets, ways to call, varying sizes, weights from files, and giving up the module's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from onecard.errors import DeviceMemoryError, EngineClosedError, ModelError, SpecError, UsageError
from onecard.streaming import stream
from onecard.streaming.model import StreamedModel, StreamOptions
from tests.unit.streaming.stacks import LENGTH, Decoder, decoder, ids, tied_cnn, weight_bytes

BUDGET = 150_000


def answers(module: nn.Module, *args: Tensor) -> dict[str, Tensor]:
    with torch.inference_mode():
        found = module(*args)
    return found if isinstance(found, dict) else {f"output_{i}": t for i, t in enumerate(found)}


def check(streamed: StreamedModel, expected: dict[str, Tensor], given: Tensor) -> None:
    got = streamed(given)
    assert list(got) == list(expected)
    for name, answer in expected.items():
        assert torch.equal(got[name], answer), name
        assert got[name].stride() == answer.stride()


@pytest.mark.parametrize("share", [2.0, 0.8, 0.4, 0.2])
@pytest.mark.parametrize("part_bytes", [1, 10_000, None])
def test_a_cnn_with_tied_weights_is_the_same_to_the_last_bit(share, part_bytes):
    module = tied_cnn()
    image = torch.randn(2, 3, 8, 8)
    base = 35_000  # activations
    budget = base + int(share * weight_bytes(module))
    with stream(module, image, budget, "cpu", options=StreamOptions(part_bytes)) as streamed:
        assert streamed.residency.device_bytes <= budget
        assert bool(streamed.residency.pass_bytes) == (share < 1)
        for _ in range(3):
            check(streamed, answers(module, image), image)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_vary_where_the_spec_lets_them(dtype):
    module = decoder().to(dtype)
    with stream(module, ids(1), "160kB", "cpu", [f"ids: int64[B,{LENGTH}], B=1..4"]) as streamed:
        for rows in (1, 4, 2, 3):
            check(streamed, answers(module, ids(rows)), ids(rows))
        with pytest.raises(SpecError, match="outside the range"):
            streamed(ids(5))


def test_without_a_spec_only_the_examples_size_is_taken():
    streamed = stream(decoder(), ids(2), BUDGET, "cpu")
    streamed(ids(2))
    with pytest.raises(SpecError, match="has size 3 in dimension 0, expected 2"):
        streamed(ids(3))


def test_it_can_be_made_and_called_within_inference_mode():
    module = decoder()
    with torch.inference_mode():
        streamed = stream(module, ids(2), BUDGET, "cpu")
        check(streamed, answers(module, ids(2)), ids(2))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, pair: tuple[Tensor, float], *, shift: Tensor) -> Tensor:
        return self.linear(x) * pair[1] + pair[0] + shift


def test_it_is_called_as_the_module_or_by_name():
    module = Scaled().eval()
    x, y, z = torch.randn(3, 2, 8)
    with torch.inference_mode():
        expected = module(x, (y, 2.0), shift=z)
    example = {"x": x, "pair": (y, 2.0), "shift": z}
    streamed = stream(module, example, 10_000, "cpu")
    assert [t.name for t in streamed.spec.inputs] == ["x", "pair", "shift"]
    assert torch.equal(streamed(**example)["output"], expected)
    assert torch.equal(streamed(x=x, pair=y, shift=z)["output"], expected)
    with pytest.raises(SpecError, match="not those that the model was captured with"):
        streamed(x=x, pair=(y, 3.0), shift=z)
    with pytest.raises(SpecError, match="more tensors than"):
        streamed(x, x, x, x)
    with pytest.raises(SpecError, match="input 'x' is float64, expected x: float32"):
        streamed(x=x.double(), pair=y, shift=z)


@pytest.mark.parametrize(
    ("example", "inputs", "reason"),
    [
        (None, None, "nothing says what the module takes"),
        ((3,), None, "hold no tensor"),
        ((object(),), None, "cannot be used"),
        (torch.zeros(1, 2, dtype=torch.complex64), None, "dtype"),
        (ids(1), ["words: int64[B,6], B=1..2"], "names"),
        (ids(3), [f"ids: int64[B,{LENGTH}], B=1..2"], "outside the range"),
    ],
)
def test_examples_and_inputs_that_do_not_fit_are_refused(example, inputs, reason):
    with pytest.raises(SpecError, match=reason):
        stream(decoder(), example, BUDGET, "cpu", inputs)


def test_a_limit_that_is_too_small_names_one_that_works():
    with pytest.raises(DeviceMemoryError) as caught:
        stream(decoder(), ids(2), 10_000, "cpu")
    assert "'head.weight', 37.50 KiB" in str(caught.value)
    enough = int(str(caught.value).rpartition("(")[2].partition(" bytes")[0])
    with stream(decoder(), ids(2), enough, "cpu") as streamed:
        check(streamed, answers(decoder(), ids(2)), ids(2))


def test_a_model_that_cannot_be_captured_says_why():
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ModelError, match="cannot be streamed"):
        stream(Branches(), torch.ones(2), BUDGET, "cpu")


def test_an_unknown_device_is_refused():
    with pytest.raises(UsageError, match="no device"):
        stream(decoder(), ids(2), BUDGET, "cuda:99")


def test_a_closed_model_says_so():
    with stream(decoder(), ids(2), BUDGET, "cpu") as streamed:
        assert streamed.is_pinned and streamed.copied_bytes
    with pytest.raises(EngineClosedError):
        streamed(ids(2))


def test_consumed_weights_are_given_up_and_the_answers_stay():
    module = decoder()
    expected = answers(module, ids(2))
    streamed = stream(module, ids(2), BUDGET, "cpu", consume=True)
    assert all(t.is_meta for t in (*module.parameters(), *module.buffers()))
    assert module.head.weight is not None and module.head.weight.is_meta
    check(streamed, expected, ids(2))
    with pytest.raises(ModelError, match=r"meta device.*weights="):
        stream(module, ids(2), BUDGET, "cpu")


def test_kept_weights_leave_the_module_alone():
    module = decoder()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with stream(module, ids(2), BUDGET, "cpu") as streamed:
        streamed(ids(2))
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])


def announced() -> Decoder:
    """A decoder without values but for its buffer, which no checkpoint holds."""
    with torch.device("meta"):
        module = Decoder()
    module.head.weight = module.embed.weight
    module.places = decoder().places
    return module.eval()


@pytest.mark.parametrize("files", [1, 3])
def test_a_module_without_values_takes_them_from_files(files, tmp_path):
    tensors = dict(decoder().named_parameters())  # tied weights once, as checkpoints have them
    for index in range(files):
        chosen = {name: t for i, (name, t) in enumerate(tensors.items()) if i % files == index}
        save_file(chosen, tmp_path / f"model-{index}.safetensors")
    place = tmp_path if files > 1 else tmp_path / "model-0.safetensors"
    with stream(announced(), ids(2), BUDGET, "cpu", weights=place) as streamed:
        check(streamed, answers(decoder(), ids(2)), ids(2))


def test_files_that_do_not_fit_are_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="no safetensors file"):
        stream(announced(), ids(2), BUDGET, "cpu", weights=tmp_path)
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(ModelError, match="cannot be read"):
        stream(announced(), ids(2), BUDGET, "cpu", weights=tmp_path / "bad.safetensors")
    tensors = {name: t.detach() for name, t in decoder().named_parameters()}
    save_file({**tensors, "blocks.2.qkv.bias": torch.zeros(3)}, tmp_path / "small.safetensors")
    with pytest.raises(ModelError, match=r"'blocks\.2\.qkv\.bias' is float32\[3\], expected float32\[96\]"):
        stream(announced(), ids(2), BUDGET, "cpu", weights=tmp_path / "small.safetensors")
    del tensors["blocks.2.qkv.bias"]
    save_file(tensors, tmp_path / "partly.safetensors")
    with pytest.raises(ModelError, match=r"'blocks\.2\.qkv\.bias' is on the meta device"):
        stream(announced(), ids(2), BUDGET, "cpu", weights=tmp_path / "partly.safetensors")

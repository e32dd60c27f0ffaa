"""The backend that streams: a program without weights, weights in part files, and a limit of device memory."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest
import torch
from torch import nn

from onecard.backends import get_backend
from onecard.backends.base import Target
from onecard.backends.stream import StreamBackend, _place
from onecard.errors import BundleError, DeviceMemoryError, Unsupported
from onecard.models.exported import load_exported
from onecard.models.flat import by_name
from onecard.models.load import load_model
from onecard.models.model import Model
from onecard.search.recipes import parse_recipe
from onecard.transforms import apply_transforms
from tests.unit.streaming.stacks import LENGTH, decoder, ids, weight_bytes

BACKEND = StreamBackend()


@pytest.fixture
def model() -> Model:
    return load_model(decoder(), inputs=[f"ids: int64[B,{LENGTH}] in 0..299, B=1..4"])


def target(model: Model, tmp_path, recipe: str = "stream", memory: int | None = 150_000) -> Target:
    folders = tmp_path / "source", tmp_path / "shared"
    return Target(parse_recipe(recipe), model.spec, "cpu", None, *folders, device_memory=memory)


def make(model: Model, tmp_path, recipe: str = "stream"):
    wanted = target(model, tmp_path, recipe)
    folder = tmp_path / "made"
    folder.mkdir()
    module = apply_transforms(model.flat, wanted.recipe.transforms, {"ids": ids(2)})
    with torch.inference_mode():
        expected = {rows: by_name(module, model.spec, {"ids": ids(rows)}) for rows in (1, 3, 4)}
    BACKEND.build(module, {"ids": ids(2)}, folder, wanted)
    return folder, wanted, expected


@pytest.mark.parametrize("recipe", ["stream", "stream+bf16"])
def test_what_is_loaded_answers_as_the_module_to_the_last_bit(recipe, model, tmp_path):
    folder, wanted, expected = make(model, tmp_path, recipe)
    runner = get_backend("stream").load(folder, wanted)
    for rows, answer in expected.items():
        got = runner({"ids": ids(rows)})
        assert list(got) == list(answer)
        assert all(torch.equal(got[name], answer[name]) for name in answer)
    runner.close()


def test_the_program_holds_no_weights_and_nothing_is_a_pickle(model, tmp_path):
    folder, _, _ = make(model, tmp_path)
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert kinds == {".pt2", ".json", ".safetensors"}
    stored = sum(path.stat().st_size for path in (folder / "parts").iterdir())
    assert weight_bytes(decoder()) <= stored < weight_bytes(decoder()) + 4096 * 20
    assert torch.export.load(folder / "program.pt2").state_dict["inner.head.weight"].untyped_storage().nbytes() <= 64


def test_the_split_is_told_beside_it(model, tmp_path):
    folder, _, _ = make(model, tmp_path)
    note = msgspec.json.decode((folder / "split.json").read_bytes())
    assert note["device_memory"] == 150_000
    assert len(note["parts"]) == len(note["cuts"]) > 4
    assert note["parts"][0] | {"bytes": 0} == {"name": "part-000", "first": "head", "last": "head", "bytes": 0}


@pytest.mark.parametrize("memory", [10_000_000, 140_000, 104_000])
def test_another_limit_may_be_set_when_it_is_loaded(memory, model, tmp_path):
    folder, _, expected = make(model, tmp_path)
    runner = BACKEND.load(folder, target(model, tmp_path, memory=memory))
    assert all(torch.equal(runner({"ids": ids(3)})[name], expected[3][name]) for name in expected[3])


def test_without_one_the_limit_is_that_of_building(model, tmp_path):
    folder, _, _ = make(model, tmp_path)
    runner = BACKEND.load(folder, target(model, tmp_path, memory=None))
    assert runner._runner.residency.budget.device_bytes == 150_000


def test_it_is_available_where_a_limit_is_given(model, tmp_path):
    assert BACKEND.available(target(model, tmp_path)) is None
    unlimited = target(model, tmp_path, memory=None)
    verdict = BACKEND.available(unlimited)
    assert verdict is not None and verdict.reason == "unavailable" and "--device-memory" in verdict.cure
    with pytest.raises(Unsupported, match="no limit"):
        BACKEND.build(model.flat, {"ids": ids(2)}, tmp_path, unlimited)


def test_a_limit_too_small_is_said_when_building_and_when_loading(model, tmp_path):
    folder, _, _ = make(model, tmp_path)
    wanted = target(model, tmp_path, memory=20_000)
    with pytest.raises(DeviceMemoryError, match="Give at least"):
        BACKEND.load(folder, wanted)
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(Unsupported) as caught:
        BACKEND.build(
            load_model(decoder(), inputs=[str(model.spec.inputs[0]) + ", B=1..4"]).flat, {"ids": ids(2)}, other, wanted
        )
    assert "Give at least" in caught.value.cure


def test_buckets_of_their_own_are_refused(model, tmp_path):
    static = Target(
        parse_recipe("stream@bucket"), model.spec, "cpu", {"B": 2}, tmp_path, tmp_path, device_memory=150_000
    )
    with pytest.raises(Unsupported, match="weights of its own"):
        BACKEND.build(model.flat, {"ids": ids(2)}, tmp_path, static)


def test_damaged_notes_and_files_are_refused(model, tmp_path):
    folder, wanted, _ = make(model, tmp_path)
    (folder / "parts" / "part-002.safetensors").unlink()
    with pytest.raises(BundleError, match="lack the weight"):
        BACKEND.load(folder, wanted)
    (folder / "split.json").write_text("{}")
    with pytest.raises(BundleError, match=r"split\.json cannot be read"):
        BACKEND.load(folder, wanted)


def test_a_closed_runner_says_so(model, tmp_path):
    folder, wanted, _ = make(model, tmp_path)
    runner = BACKEND.load(folder, wanted)
    runner.close()
    with pytest.raises(Exception, match="closed"):
        runner({"ids": ids(1)})


class Places(nn.Module):
    """Makes a tensor where its input is, and has a buffer that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("shift", torch.randn(8), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(8, device=x.device)
        return self.second(self.first(x) + places) * torch.tensor(0.5) + self.shift


def test_it_is_built_on_the_host_for_a_card_and_loads_on_another_one(tmp_path):
    model = load_model(Places(), inputs=["x: float32[B,8], B=1..4"])
    card = Target(parse_recipe("stream"), model.spec, "cuda:0", None, tmp_path / "source", tmp_path / "shared")
    card = dataclasses.replace(card, device_memory=150_000)
    folder = tmp_path / "made"
    folder.mkdir()
    assert BACKEND.builds_on_host
    BACKEND.build(model.flat, {"x": torch.randn(2, 8)}, folder, card)
    program = load_exported(folder / "program.pt2")
    _place(program.graph_module, "cuda:1")
    made = [n.kwargs["device"] for n in program.graph.nodes if "arange" in str(n.target)]
    assert made == [torch.device("cuda:1")]
    assert {t.device.type for t in program.constants.values()} == {"cpu"}  # a number stays where eager has it
    assert model.flat.inner.first.weight.device.type == "cpu"

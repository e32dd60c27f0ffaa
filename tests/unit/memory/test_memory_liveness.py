"""Predicted live bytes: against graphs counted by hand, and against the storages of real runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from onecard.errors import Unsupported
from onecard.inputs import make_inputs
from onecard.memory.figures import Prediction
from onecard.memory.liveness import CapturedModel, largest_layer_bytes, predict_as_written
from onecard.models.files import open_torchscript
from onecard.models.load import load_model
from onecard.models.model import Model
from tests.unit.memory.planned_models import (
    IMAGE,
    ROW,
    ROW_BYTES,
    TOKENS,
    VECTOR,
    Asks,
    Branch,
    Chain,
    InPlace,
    Residual,
    ResNet,
    Several,
    Tied,
    View,
    tiny_bert,
)


def written(model: Model, batch: int, precision: str = "fp32") -> Prediction:
    return predict_as_written(model.flat, model.spec, {"B": batch}, precision)


def captured(model: Model, batch: int, precision: str = "fp32") -> Prediction:
    return CapturedModel(model.flat, model.spec).predict({"B": batch}, precision)


def rows(nbytes: int, batch: int) -> float:
    return nbytes / (ROW_BYTES * batch)


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize(
    ("kind", "as_written", "from_graph"),
    # the most rows alive at once that the pass made, its answers included
    [(Chain, 2, 2), (Residual, 4, 3), (View, 1.5, 1.5), (InPlace, 1, 1), (Branch, 6, 6)],
)
def test_counted_by_hand(kind: type[nn.Module], as_written: float, from_graph: float, batch: int):
    model = load_model(kind(), inputs=[VECTOR])
    for found, expected in ((written(model, batch), as_written), (captured(model, batch), from_graph)):
        assert rows(found.peak_bytes, batch) == expected
        assert found.weights_bytes == 0
        assert rows(found.inputs_bytes, batch) == 1
        assert found.outputs_bytes == found.answer_bytes
        assert found.activations_bytes == found.peak_bytes - found.outputs_bytes
        assert found.live_bytes == found.inputs_bytes + found.peak_bytes


def test_answers_that_share_memory_count_once():
    found = written(load_model(Several(), inputs=[VECTOR]), 2)
    assert rows(found.outputs_bytes, 2) == 2
    assert found.answer_bytes == 3 * 2 * ROW_BYTES + 2 * 4 * 4
    assert found.activations_bytes == 0


def test_tied_weights_count_once():
    model = load_model(Tied(), inputs=[VECTOR])
    for found in (written(model, 3), captured(model, 3)):
        assert found.weights_bytes == 4 * ROW * ROW + 4 * ROW
        assert rows(found.peak_bytes, 3) == 2
    assert largest_layer_bytes(model.flat) == 4 * ROW * ROW
    assert largest_layer_bytes(model.flat, "fp16") == 2 * ROW * ROW


def test_half_precision_casts_what_goes_in_and_comes_out():
    model = load_model(Tied(), inputs=[VECTOR])
    before = {name: t.dtype for name, t in model.flat.state_dict().items()}
    for precision in ("fp16", "bf16"):
        for found in (written(model, 4, precision), captured(model, 4, precision)):
            assert found.weights_bytes == 2 * ROW * ROW + 2 * ROW
            assert rows(found.inputs_bytes, 4) == rows(found.outputs_bytes, 4) == 1
            assert 1 < rows(found.peak_bytes, 4) <= 2
    assert {name: t.dtype for name, t in model.flat.state_dict().items()} == before


def test_the_layer_at_the_peak_has_its_name():
    model = load_model(ResNet(), inputs=[IMAGE])
    assert written(model, 2).peak_layer.startswith("stem.")
    assert captured(model, 2).peak_layer.startswith("stem.")
    assert written(load_model(Chain(), inputs=[VECTOR]), 1).peak_layer == "the model itself"


def test_predicting_leaves_no_hooks_and_no_fake_weights():
    model = load_model(ResNet(), inputs=[IMAGE])
    written(model, 2)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.flat.modules())
    assert all(type(t) is nn.Parameter for t in model.flat.parameters())


def test_one_capture_serves_every_size():
    model = load_model(ResNet(), inputs=[IMAGE])
    graph = CapturedModel(model.flat, model.spec)
    small, large = graph.predict({"B": 1}), graph.predict({"B": 16})
    assert large.peak_bytes == pytest.approx(16 * small.peak_bytes, rel=0.01)
    assert large.weights_bytes == small.weights_bytes


def test_what_looks_into_a_tensor_cannot_be_predicted():
    model = load_model(Asks(), inputs=[VECTOR])
    with pytest.raises(Unsupported, match="asks what is in a tensor"):
        written(model, 1)
    with pytest.raises(Unsupported, match=r"torch\.export cannot trace"):
        captured(model, 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_followed_through_its_interpreter(tmp_path):
    torch.manual_seed(0)
    module = ResNet().eval()
    torch.jit.trace(module, torch.zeros(2, 3, 64, 64)).save(str(tmp_path / "net.pt"))
    scripted = load_model(str(tmp_path / "net.pt"), inputs=[IMAGE])
    plain = load_model(module, inputs=[IMAGE])
    assert open_torchscript(tmp_path / "net.pt") is not None
    found, expected = written(scripted, 4), written(plain, 4)
    assert found.weights_bytes == expected.weights_bytes
    assert found.peak_bytes == pytest.approx(expected.peak_bytes, rel=0.05)
    with pytest.raises(Unsupported, match="fp32 only"):
        written(scripted, 4, "fp16")


class RealStorages(TorchDispatchMode):
    """Another way to the same figure: after every operator, look which storages are still there."""

    def __init__(self, held: list[Tensor]) -> None:
        super().__init__()
        self._held = {t.untyped_storage().data_ptr() for t in held}
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        answer = func(*args, **(kwargs or {}))
        self._seen = {k: (ref, n) for k, (ref, n) in self._seen.items() if not ref.expired()}
        for leaf in tree_leaves(answer):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self._held:
                storage = leaf.untyped_storage()
                self._seen[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, sum(nbytes for _, nbytes in self._seen.values()))
        return answer


def tracked(model: Model, bucket: dict[str, int], dtype: torch.dtype | None = None) -> int:
    """The peak of a real run, with masks that hide something: models leave out a mask that hides nothing."""
    made = make_inputs(model.spec, bucket)
    for name, tensor in made.items():
        if "mask" in name:
            tensor[:, -1] = 0
    inputs = list(made.values())
    if dtype is not None:
        model.flat.inner.to(dtype)
        model.flat.compute_dtype, model.flat.output_dtypes = dtype, (torch.float32,) * len(model.spec.outputs)
    storages = RealStorages([*inputs, *model.flat.parameters(), *model.flat.buffers()])
    with torch.inference_mode(), storages:
        answers = model.flat(*inputs)
    assert len(answers) == len(model.spec.outputs)
    return storages.peak_bytes


REAL: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], list[dict[str, int]]]] = {
    "resnet": (ResNet, (IMAGE,), [{"B": 1}, {"B": 16}]),
    "bert": (tiny_bert, TOKENS, [{"B": 1, "S": 2}, {"B": 1, "S": 64}, {"B": 8, "S": 64}]),
}


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_predicted_is_what_a_real_run_holds(name: str, precision: str):
    make, inputs, buckets = REAL[name]
    model = load_model(make(), inputs=inputs)
    found = {str(b): predict_as_written(model.flat, model.spec, b, precision).peak_bytes for b in buckets}
    # Some bf16 kernels of a CPU do without what the operator's shapes promise (the indices of a max pooling).
    dtype, within = (torch.bfloat16, 0.1) if precision == "bf16" else (None, 0.03)
    for bucket in buckets:
        again = load_model(make(), inputs=inputs)
        assert found[str(bucket)] == pytest.approx(tracked(again, bucket, dtype), rel=within)


@pytest.mark.parametrize("name", REAL)
def test_a_graph_never_holds_more_than_the_code(name: str):
    make, inputs, buckets = REAL[name]
    model = load_model(make(), inputs=inputs)
    graph = CapturedModel(model.flat, model.spec)
    for bucket in buckets[-1:]:
        code = predict_as_written(model.flat, model.spec, bucket)
        found = graph.predict(bucket)
        assert found.weights_bytes == code.weights_bytes
        assert 0.5 * code.peak_bytes < found.peak_bytes <= code.peak_bytes

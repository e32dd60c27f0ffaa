"""Tensors of every layout come back as they were, and equal ones are kept once."""

import pytest
import torch

from onecard.backends.tensors import TensorStore

GENERATOR = torch.Generator().manual_seed(0)
BLOCK = torch.randn(4, 6, 5, 3, generator=GENERATOR)
LAYOUTS = {
    "contiguous": BLOCK,
    "channels last": BLOCK.to(memory_format=torch.channels_last),
    "transposed": BLOCK[0, 0].t(),
    "permuted": BLOCK.permute(2, 0, 3, 1),
    "dense part of another": BLOCK[1:3],
    "scalar": torch.tensor(3.5),
    "one element": torch.zeros(1, 1, 1),
    "empty": torch.zeros(0, 3),
    "empty inside": torch.zeros(3, 0, 2),
    "with gaps": BLOCK[:, ::2],
    "last column": BLOCK[..., -1],
    "expanded": torch.ones(3, 1).expand(3, 7),
    "parameter": torch.nn.Parameter(torch.ones(2, 2)),
    "bfloat16": BLOCK.bfloat16(),
    "int8": BLOCK.to(torch.int8),
    "int64": torch.arange(7),
    "bool": BLOCK > 0,
}


def dense(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_tensor_comes_back_with_its_layout(name, tmp_path):
    tensor = LAYOUTS[name]
    store = TensorStore(tmp_path / "made", {})
    stored = store.add(tensor)
    store.save()
    found = TensorStore(tmp_path / "made", {}).load(stored, "cpu")
    assert found.dtype == tensor.dtype
    assert torch.equal(found, tensor)
    assert dense(found)
    if name not in ("with gaps", "last column", "expanded"):
        assert found.stride() == tensor.stride()


def test_all_layouts_live_in_one_folder(tmp_path):
    store = TensorStore(tmp_path, {})
    stored = {}
    for name, tensor in LAYOUTS.items():
        stored[name] = store.add(tensor)
        store.save()
    again = TensorStore(tmp_path, {})
    assert all(torch.equal(again.load(stored[name], "cpu"), tensor) for name, tensor in LAYOUTS.items())


def test_equal_tensors_are_kept_once_over_several_artifacts(tmp_path):
    for part in range(3):
        store = TensorStore(tmp_path, {})
        store.add(BLOCK)
        store.add(BLOCK.clone())
        store.add(torch.full((2,), float(part)))
        store.save()
    size = sum(p.stat().st_size for p in tmp_path.iterdir())
    assert BLOCK.nbytes < size < 2 * BLOCK.nbytes
    assert len(list(tmp_path.iterdir())) == 3


def test_nothing_new_makes_no_file(tmp_path):
    store = TensorStore(tmp_path / "made", {})
    store.save()
    assert not (tmp_path / "made").exists()


def test_equal_bytes_of_another_dtype_are_another_tensor(tmp_path):
    store = TensorStore(tmp_path, {})
    pair = [store.add(torch.zeros(4, dtype=dtype)) for dtype in (torch.float32, torch.int32)]
    store.save()
    assert [store.load(s, "cpu").dtype for s in pair] == [torch.float32, torch.int32]


def test_loaded_tensors_share_memory_over_stores_with_one_memo(tmp_path):
    store = TensorStore(tmp_path, {})
    stored, turned = store.add(BLOCK[0, 0]), store.add(BLOCK[0, 0].clone())
    store.save()
    memo = {}
    first, second = (TensorStore(tmp_path, memo).load(s, "cpu") for s in (stored, turned))
    assert first.data_ptr() == second.data_ptr()
    assert TensorStore(tmp_path, {}).load(stored, "cpu").data_ptr() != first.data_ptr()


def test_a_later_change_of_the_tensor_does_not_reach_the_store(tmp_path):
    tensor = torch.ones(3)
    store = TensorStore(tmp_path, {})
    stored = store.add(tensor)
    tensor.zero_()
    store.save()
    assert torch.equal(store.load(stored, "cpu"), torch.ones(3))

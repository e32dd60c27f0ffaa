"""Files of named arrays: both kinds, whole or not at all, and never a pickle."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from onecard.arrays import check_output, describe_arrays, read_arrays, write_arrays
from onecard.errors import DataError, StorageError, UsageError

ARRAYS = {
    "image": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "turned": np.arange(6, dtype=np.int64).reshape(2, 3).T,
    "half": np.ones((2, 2), np.float16),
    "mask": np.array([True, False]),
    "scalar": np.array(7, np.uint8),
    "none": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_written_arrays_are_read_back(suffix, tmp_path):
    path = tmp_path / f"arrays{suffix}"
    write_arrays(path, ARRAYS)
    found = read_arrays(path)
    assert set(found) == set(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_an_older_file_is_replaced(tmp_path):
    path = tmp_path / "arrays.npz"
    for value in (1, 2):
        write_arrays(path, {"x": np.array(value)})
    assert read_arrays(path)["x"] == 2


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"there is no file .*Pass an \.npz"):
        read_arrays(tmp_path / "x.npz")


def test_other_suffix(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("1,2")
    with pytest.raises(DataError, match=r"neither \.npz nor \.safetensors"):
        read_arrays(path)


@pytest.mark.parametrize("name", ["x.npz", "x.safetensors"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 rubbish", b"\xff" * 64])
def test_damaged_file(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        read_arrays(path)


def test_python_objects_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, x=np.array([{"evil": 1}], dtype=object))
    with pytest.raises(DataError, match="allow_pickle"):
        read_arrays(path)


def test_a_dtype_that_numpy_lacks_is_refused(tmp_path):
    save_file({"x": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "x.safetensors")
    with pytest.raises(DataError, match="bfloat16"):
        read_arrays(tmp_path / "x.safetensors")


def test_outputs_are_checked_before_the_work(tmp_path):
    check_output(tmp_path / "x.npz")
    with pytest.raises(UsageError, match="for -o"):
        check_output(tmp_path / "x.txt")
    with pytest.raises(StorageError, match="there is no folder"):
        check_output(tmp_path / "nowhere" / "x.npz")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_file_that_cannot_be_written_leaves_nothing(suffix, tmp_path):
    path = tmp_path / f"arrays{suffix}"
    path.mkdir()  # a folder is in the way of the rename
    with pytest.raises(StorageError, match=r"cannot be written.*another place with -o"):
        write_arrays(path, ARRAYS)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_description_shows_the_largest_classes_or_the_first_elements():
    lines = list(describe_arrays({"logits": np.array([[0.0, 3.0, 1.0, 2.0, -1.0, 0.5]]), "ids": np.arange(9)}))
    assert lines == [
        "logits: float64[1, 6]  largest of row 0: 1 (3), 3 (2), 2 (1), 5 (0.5), 0 (0)",
        "ids: int64[9]  begins 0, 1, 2, 3, 4",
    ]

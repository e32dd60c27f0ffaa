"""Labelled data: each form that is read, each fault that is refused with the tensor's name and a cure."""

import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from onecard.errors import DataError, UsageError
from onecard.spec import parse_spec
from onecard.verify.data import batches, load_data

IMAGES = parse_spec(["image: float32[B,3,4,4], B=1..8"])
TEXT = parse_spec(["input_ids: int64[B,S] in 0..99, B=1..8, S=1..16", "mask: int64[B,S]"])


def images(rows=5, dtype="float32"):
    return np.linspace(0, 1, rows * 48).reshape(rows, 3, 4, 4).astype(dtype)


def npz(folder, **arrays):
    path = folder / "data.npz"
    np.savez(path, **arrays)
    return str(path)


def refuse(text, spec, match):
    with pytest.raises(DataError, match=match) as caught:
        load_data(text, spec)
    return caught.value


class TestFiles:
    def test_npz(self, tmp_path):
        dataset = load_data(npz(tmp_path, image=images(20), label=np.arange(20)), IMAGES)
        assert dataset.rows == 20  # more than the range of B: they are run in batches
        assert torch.equal(dataset.inputs["image"], torch.from_numpy(images(20)))
        assert torch.equal(dataset.labels, torch.arange(20))

    @pytest.mark.parametrize("name", ["label", "labels"])
    def test_safetensors(self, tmp_path, name):
        path = tmp_path / "data.safetensors"
        save_file({"image": torch.from_numpy(images()), name: torch.arange(5)}, path)
        dataset = load_data(str(path), IMAGES)
        assert torch.equal(dataset.labels, torch.arange(5))

    def test_several_labels_and_none(self, tmp_path):
        arrays = {"image": images(), "label_start": np.zeros(5, int), "label_end": np.ones(5, int)}
        labels = load_data(npz(tmp_path, **arrays), IMAGES).labels
        assert set(labels) == {"start", "end"}
        assert load_data(npz(tmp_path, image=images()), IMAGES).labels is None

    def test_pickles_are_refused_unread(self, tmp_path):
        class Bomb:
            def __reduce__(self):
                return (tmp_path.joinpath("exploded").touch, ())

        array = np.empty(2, dtype=object)
        array[:] = [Bomb(), Bomb()]
        error = refuse(npz(tmp_path, image=images(2), label=array), IMAGES, "pickles")
        assert "numpy.savez" in error.cure
        plain = tmp_path / "plain.npz"
        plain.write_bytes(pickle.dumps(Bomb()))
        refuse(str(plain), IMAGES, "pickles")
        assert not (tmp_path / "exploded").exists()

    def test_damaged(self, tmp_path):
        path = tmp_path / "data.npz"
        whole = npz(tmp_path, image=images())
        content = path.read_bytes()
        for bad in (b"", b"PK\x03\x04", content[: len(content) // 2], content[:200] + b"\xff" * 40 + content[240:]):
            path.write_bytes(bad)
            refuse(whole, IMAGES, "data.npz")
        tensors = tmp_path / "data.safetensors"
        for bad in (b"", b"\xff" * 64):
            tensors.write_bytes(bad)
            refuse(str(tensors), IMAGES, "cannot read")
        with path.open("wb") as file:
            np.save(file, images())
        refuse(whole, IMAGES, "not an .npz archive")

    def test_absent_and_unknown_form(self, tmp_path):
        refuse(str(tmp_path / "none.npz"), IMAGES, "there is no file")
        for text in ("data.csv", "", "folder"):
            with pytest.raises(UsageError, match="cannot read data"):
                load_data(text, IMAGES)

    def test_arrays_that_belong_to_nothing(self, tmp_path):
        refuse(npz(tmp_path, image=images(), token_types=np.zeros(5)), IMAGES, "token_types")
        refuse(npz(tmp_path, image=images(), label=np.zeros(5), label_x=np.zeros(5)), IMAGES, "labels twice")
        refuse(npz(tmp_path, picture=images()), IMAGES, "picture")
        refuse(npz(tmp_path, label=np.zeros(5)), IMAGES, r"expected \['image'\]")

    def test_strings_are_no_labels(self, tmp_path):
        refuse(npz(tmp_path, image=images(2), label=np.array(["cat", "dog"])), IMAGES, "'label' is <U3")

    def test_an_input_named_label(self, tmp_path):
        spec = parse_spec(["label: float32[B,2], B=1..4"])
        dataset = load_data(npz(tmp_path, label=np.ones((3, 2), "float32"), labels=np.arange(3)), spec)
        assert dataset.inputs["label"].shape == (3, 2)
        assert dataset.labels.tolist() == [0, 1, 2]


class TestChecks:
    def test_shape(self, tmp_path):
        refuse(
            npz(tmp_path, image=images()[:, :, :3]), IMAGES, r"'image' is float32\[5, 3, 3, 4\]: dimension 2 must be 4"
        )
        refuse(npz(tmp_path, image=images()[0]), IMAGES, r"expected image: float32\[B,3,4,4\]")
        refuse(npz(tmp_path, image=np.float32(3)), IMAGES, "no rows")

    def test_symbols(self, tmp_path):
        ids = np.ones((3, 20), int)
        refuse(npz(tmp_path, input_ids=ids, mask=ids), TEXT, r"S=20, outside S=1\.\.16")
        refuse(npz(tmp_path, input_ids=ids[:, :8], mask=ids[:, :9]), TEXT, "dimension 1 must be 8")
        assert load_data(npz(tmp_path, input_ids=ids[:, :8], mask=ids[:, :8]), TEXT).rows == 3

    def test_rows(self, tmp_path):
        refuse(npz(tmp_path, image=images(0)), IMAGES, "empty")
        refuse(npz(tmp_path, image=images(3), label=np.arange(4)), IMAGES, "numbers of rows differ")
        refuse(npz(tmp_path, image=images(3), label_a=np.arange(4)), IMAGES, "label_a")

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_not_finite(self, tmp_path, value):
        array = images()
        array[3, 0, 0, 0] = value
        refuse(npz(tmp_path, image=array), IMAGES, "first in row 3")

    def test_overflow_in_the_cast_is_not_finite(self, tmp_path):
        refuse(npz(tmp_path, image=images(dtype="float64") * 1e300), IMAGES, "NaN or infinity")

    @pytest.mark.parametrize("dtype", ["float64", "float16", ">f4"])
    def test_floats_that_are_cast(self, tmp_path, dtype):
        assert load_data(npz(tmp_path, image=images(dtype=dtype)), IMAGES).inputs["image"].dtype == torch.float32

    @pytest.mark.parametrize("dtype", ["uint8", "int64", "bool", "complex64"])
    def test_no_integer_becomes_a_float(self, tmp_path, dtype):
        error = refuse(npz(tmp_path, image=images(dtype=dtype)), IMAGES, r"expected image: float32")
        assert "normalised" in error.cure

    @pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "int64"])
    def test_integers_that_are_cast(self, tmp_path, dtype):
        ids = np.ones((2, 4), dtype)
        assert load_data(npz(tmp_path, input_ids=ids, mask=ids), TEXT).inputs["mask"].dtype == torch.int64

    def test_integers_that_do_not_fit(self, tmp_path):
        spec = parse_spec(["x: int8[B,2], B=1..4"])
        assert load_data(npz(tmp_path, x=np.array([[1, -128]])), spec).inputs["x"].dtype == torch.int8
        refuse(npz(tmp_path, x=np.array([[1, 128]])), spec, r"expected x: int8")
        refuse(npz(tmp_path, x=np.array([[1.0, 2.0]])), spec, r"expected x: int8")
        refuse(npz(tmp_path, x=np.array([[0, 1]])), parse_spec(["x: bool[B,2], B=1..4"]), "expected x: bool")
        refuse(
            npz(tmp_path, x=np.ones((1, 2), "float32")), parse_spec(["x: float16[B,2], B=1..4"]), "expected x: float16"
        )

    def test_values_outside_of_the_vocabulary(self, tmp_path):
        ids = np.full((2, 4), 100)
        refuse(npz(tmp_path, input_ids=ids, mask=np.ones_like(ids)), TEXT, r"'input_ids' holds values 100\.\.100")

    def test_fixed_batch(self, tmp_path):
        spec = parse_spec(["x: float32[2,3]"])
        assert load_data(npz(tmp_path, x=np.ones((4, 3), "float32")), spec).rows == 4
        refuse(npz(tmp_path, x=np.ones((5, 3), "float32")), spec, "takes just 2 at a time")

    def test_inputs_without_a_common_first_dimension(self, tmp_path):
        spec = parse_spec(["x: float32[B,3], B=1..4", "scale: float32[1]"])
        arrays = {"x": np.ones((4, 3), "float32"), "scale": np.ones(1, "float32")}
        refuse(npz(tmp_path, **arrays), spec, "share their first dimension")


class TestFunctions:
    CODE = """
import numpy as np, torch
x = torch.arange(96.).reshape(2, 3, 4, 4)
def whole(): return {"image": x}, torch.tensor([1, 2])
def lone(): return x, [1, 2]
def unlabelled(): return x.numpy(), None
def stream():
    for i in range(3): yield {"image": x}, {"a": torch.tensor([i, i]), "b": np.array([i, i])}
def loader(): return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.tensor([1, 2])), batch_size=1)
def pair_of_pairs(): return (x, [1, 2]), (x, [3, 4])
def empty(): return []
def wrong(): return 3
def triple(): return [(x, 1, 2)]
def half(): return [(x, [1, 2]), (x, None)]
def uneven(): return [(x, [1, 2]), (x[:, :, :2], [1, 2])]
def renamed(): return [({"image": x}, None), ({"picture": x}, None)]
def fails(): raise RuntimeError("no disk")
"""

    @pytest.fixture
    def source(self, tmp_path):
        path = tmp_path / "rows.py"
        path.write_text(self.CODE)
        return path

    @pytest.mark.parametrize(
        ("name", "rows", "labels"),
        [("whole", 2, [1, 2]), ("lone", 2, [1, 2]), ("loader", 2, [1, 2]), ("pair_of_pairs", 4, [1, 2, 3, 4])],
    )
    def test_forms(self, source, name, rows, labels):
        dataset = load_data(f"{source}:{name}", IMAGES)
        assert dataset.rows == rows
        assert dataset.labels.tolist() == labels

    def test_unlabelled_and_stream(self, source):
        assert load_data(f"{source}:unlabelled", IMAGES).labels is None
        stream = load_data(f"{source}:stream", IMAGES)
        assert stream.rows == 6
        assert set(stream.labels) == {"a", "b"}
        assert all(tensor.tolist() == [0, 0, 1, 1, 2, 2] for tensor in stream.labels.values())

    @pytest.mark.parametrize(
        ("name", "match"),
        [
            ("empty", "gave no batch"),
            ("wrong", "TypeError"),
            ("triple", "must return"),
            ("half", "some batches only"),
            ("uneven", "'image' differs"),
            ("renamed", "differ in their inputs"),
            ("fails", "RuntimeError: no disk"),
        ],
    )
    def test_faults(self, source, name, match):
        refuse(f"{source}:{name}", IMAGES, match)

    def test_one_tensor_for_two_inputs(self, source):
        refuse(f"{source}:lone", TEXT, "Give a dict with the inputs input_ids, mask")

    def test_no_such_function(self, source):
        with pytest.raises(UsageError, match="Did you mean whole"):
            load_data(f"{source}:hole", IMAGES)


def test_batches(tmp_path):
    dataset = load_data(
        npz(
            tmp_path,
            image=images(5),
            label=np.arange(5),
        ),
        IMAGES,
    )
    parts = list(batches(dataset, 2))
    assert [part.rows for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.inputs["image"] for part in parts]), dataset.inputs["image"])
    assert torch.cat([part.labels for part in parts]).tolist() == [0, 1, 2, 3, 4]
    several = load_data(npz(tmp_path, image=images(3), label_a=np.arange(3)), IMAGES)
    assert [part.labels["a"].tolist() for part in batches(several, 2)] == [[0, 1], [2]]
    assert next(batches(load_data(npz(tmp_path, image=images(3)), IMAGES), 9)).labels is None
    with pytest.raises(ValueError, match="at least one row"):
        next(batches(dataset, 0))

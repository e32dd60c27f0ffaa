import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from onecard.errors import DataError, UsageError
from onecard.spec import parse_spec
from onecard.training.data import TrainingData, in_memory, load_training_data, split_rows
from onecard.verify.data import Dataset

SPEC = parse_spec(["x: float32[B,2], B=1..8"])


def numbered(count: int = 10) -> TrainingData:
    x = torch.arange(count, dtype=torch.float32).unsqueeze(1).expand(count, 2).contiguous()
    return in_memory(Dataset({"x": x}, torch.arange(count), count), SPEC)


def numbers(data: TrainingData, epoch: int = 0, batch: int = 3, seed: int = 0, start: int = 0) -> list[list[int]]:
    found = []
    for part in data.batches(epoch, batch, seed, start):
        assert torch.equal(part.inputs["x"][:, 0].long(), part.labels)
        found.append(part.labels.tolist())
    return found


def function(tmp_path: Path, body: str) -> str:
    path = tmp_path / "rows.py"
    path.write_text(f"import numpy, torch\ncalls = []\ndef rows():\n    calls.append(1)\n{body}")
    return f"{path}:rows"


STREAM = """
    for low in (0, 4, 8, 12):
        x = torch.arange(low, low + 4).float().unsqueeze(1).expand(4, 2)
        yield {'x': x}, x[:, 0].long()
"""


def test_every_epoch_has_an_order_of_its_own_that_can_be_drawn_again() -> None:
    data = numbered()
    first, second = numbers(data), numbers(data, epoch=1)
    assert [len(part) for part in first] == [3, 3, 3]
    assert first == numbers(data) and first != second and first != numbers(data, seed=1)
    assert len({n for part in first for n in part}) == 9
    assert numbers(data, start=2) == first[2:]
    assert data.steps(3) == 3 and data.steps(100) == 1
    assert sorted(numbers(data, batch=100)[0]) == list(range(10))


def test_files_and_pairs(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", x=np.zeros((6, 2)), label=np.arange(6))
    data = load_training_data(str(tmp_path / "rows.npz"), SPEC)
    assert (data.rows, data.labelled) == (6, True)
    assert next(data.batches(0, 4, 0)).inputs["x"].dtype == torch.float32
    pair = load_training_data(function(tmp_path, "    return numpy.zeros((6, 2), 'float32'), None\n"), SPEC)
    assert (pair.rows, pair.labelled) == (6, False) and pair.dataset is not None
    assert pair.digest != data.digest


def test_a_stream_is_opened_for_every_epoch_and_cut(tmp_path: Path) -> None:
    data = load_training_data(function(tmp_path, STREAM), SPEC)
    module = next(
        m for n, m in sys.modules.items() if n.startswith("rows_") and m.__file__ == str(tmp_path / "rows.py")
    )
    assert (data.rows, data.labelled, data.dataset, data.steps(3)) == (16, True, None, 8)
    assert numbers(data)[:3] == [[0, 1, 2], [3], [4, 5, 6]]
    assert numbers(data, start=3) == numbers(data)[3:]
    assert len(module.calls) == 4
    assert numbers(data, batch=8)[-1] == [12, 13, 14, 15]


def test_a_list_of_batches_is_a_stream(tmp_path: Path) -> None:
    body = "    return [(torch.zeros(3, 2), torch.zeros(3)), (torch.ones(2, 2), torch.ones(2))]\n"
    assert load_training_data(function(tmp_path, body), SPEC).batch_rows == (3, 2)


def test_the_last_tenth_is_put_aside() -> None:
    rest, aside = split_rows(numbered(25), 0.1)
    assert aside.labels.tolist() == [23, 24]
    assert rest.rows == 23
    assert {n for part in numbers(rest, batch=23) for n in part} == set(range(23))


def test_of_a_stream_the_last_batches_are_put_aside(tmp_path: Path) -> None:
    rest, aside = split_rows(load_training_data(function(tmp_path, STREAM), SPEC), 0.3)
    assert aside.labels.tolist() == [12, 13, 14, 15]
    assert rest.rows == 12 and rest.steps(4) == 3
    assert numbers(rest, batch=4)[-1] == [8, 9, 10, 11]


def test_too_few_rows_to_put_some_aside(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"too few rows \(1\).*--data"):
        split_rows(numbered(1), 0.1)
    stream = load_training_data(function(tmp_path, "    yield torch.zeros(3, 2), None\n"), SPEC)
    with pytest.raises(DataError, match=r"too few rows \(3\)"):
        split_rows(stream, 0.1)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("    yield torch.full((2, 2), float('nan')), None\n", "NaN or infinity"),
        ("    yield torch.zeros(2, 3), None\n", "dimension 1 must be 2"),
        ("    yield torch.zeros(2, 2, dtype=torch.int64), None\n", r"expected x: float32\[B,2\]"),
        ("    yield torch.zeros(0, 2), None\n", "empty"),
        ("    yield from ()\n", "gave no batch"),
        ("    return 3\n", "returned a int"),
        ("    yield torch.zeros(2, 2)\n", r"must return \(inputs, labels\)"),
        ("    yield torch.zeros(2, 2), torch.zeros(3)\n", "numbers of rows differ"),
        ("    yield torch.zeros(2, 2), torch.zeros(2)\n    yield torch.zeros(2, 2), None\n", "some batches only"),
        ("    raise OSError('gone')\n", "failed with OSError: gone"),
        ("    yield torch.zeros(2, 2), None\n    raise OSError('gone')\n", "failed with OSError: gone"),
        ("    yield {'y': torch.zeros(2, 2)}, None\n", r"expected \['x'\]"),
    ],
)
def test_streams_that_do_not_fit(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_training_data(function(tmp_path, body), SPEC)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", x=np.full((6, 2), np.inf, "float32"))
    with pytest.raises(DataError, match="NaN or infinity"):
        load_training_data(str(tmp_path / "rows.npz"), SPEC)
    with pytest.raises(DataError, match="no file"):
        load_training_data(str(tmp_path / "missing.npz"), SPEC)
    with pytest.raises(UsageError, match="cannot read data"):
        load_training_data("missing", SPEC)


def test_the_random_numbers_of_the_caller_are_left_alone(tmp_path: Path) -> None:
    text = function(tmp_path, "    for _ in range(2):\n        yield torch.randn(4, 2), None\n")
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first = load_training_data(text, SPEC)
    assert torch.equal(torch.rand(2), expected)
    assert first.digest == load_training_data(text, SPEC).digest

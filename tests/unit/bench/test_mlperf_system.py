"""The system under test on a real engine, without LoadGen: every sample gets its own answer, and failures are told."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
import torch

from onecard.bench.mlperf_accuracy import read_answers
from onecard.bench.mlperf_system import AnswerField, Bytes, SystemUnderTest, rows_per_request
from onecard.errors import EngineError, UsageError
from onecard.spec import TensorSpec, parse_spec
from onecard.verify.data import Dataset
from tests.unit.runtime.null_specs import ROWS, engine_of, rows_of

TWO_OUTPUTS = msgspec.structs.replace(
    ROWS, outputs=(TensorSpec("y", "float32", ("B", 3)), TensorSpec("n", "int64", ("B",)))
)
ROUNDED = msgspec.structs.replace(
    parse_spec(["x: bfloat16[B,3], B=1..4"]), outputs=(TensorSpec("y", "bfloat16", ("B", 3)),)
)


class Collector:
    """Takes answers in LoadGen's place; copies them as it does."""

    def __init__(self, samples: int) -> None:
        self.answers: dict[int, bytes] = {}
        self.requests: list[int] = []
        self.errors: list[BaseException] = []
        self.done = threading.Event()
        self._samples = samples

    def complete(self, ids: Sequence[int], answers: Bytes) -> None:
        self.requests.append(len(ids))
        self.answers.update({number: answers[i].tobytes() for i, number in enumerate(ids)})
        if len(self.answers) == self._samples:
            self.done.set()

    def fail(self, error: BaseException) -> None:
        self.errors.append(error)
        self.done.set()


def dataset(rows: int) -> Dataset:
    return Dataset({"x": torch.from_numpy(rows_of(7, rows))}, None, rows)


@pytest.mark.parametrize("in_bulk", [False, True])
@pytest.mark.parametrize("samples", [1, 8, 450])
def test_every_sample_gets_its_own_answer(samples, in_bulk):
    rows = dataset(10)
    taken = Collector(samples)
    indices = [(3 * number) % 10 for number in range(samples)]
    with engine_of() as engine:
        system = SystemUnderTest(engine, rows, taken.complete, taken.fail, in_bulk)
        system.issue([100 + number for number in range(samples)], indices)
        assert taken.done.wait(30)
        system.close()
    assert not taken.errors
    assert max(taken.requests) <= (32 if in_bulk else 200)
    assert (system.issued, sum(taken.requests)) == (samples, samples)
    for number, index in enumerate(indices):
        wanted = rows.inputs["x"][index].numpy() * 2 + 1
        np.testing.assert_array_equal(np.frombuffer(taken.answers[100 + number], np.float32), wanted)


def test_answers_of_several_outputs_come_back_from_the_log(tmp_path):
    taken = Collector(5)

    def compute(inputs):
        return {"y": inputs["x"] * 2, "n": inputs["x"][:, 0].long()}

    with engine_of(TWO_OUTPUTS, compute) as engine:
        system = SystemUnderTest(engine, dataset(5), taken.complete, taken.fail)
        system.issue(range(5), [4, 3, 2, 1, 0])
        assert taken.done.wait(30)
    assert system.fields == (AnswerField("y", "float32", (3,)), AnswerField("n", "int64", ()))
    entries = [{"seq_id": n, "qsl_idx": 4 - n, "data": data.hex().upper()} for n, data in taken.answers.items()]
    (tmp_path / "mlperf_log_accuracy.json").write_text(json.dumps(entries))
    found = read_answers(tmp_path, system.fields, 5)
    x = dataset(5).inputs["x"]
    assert torch.equal(found["y"], x * 2)
    assert torch.equal(found["n"], x[:, 0].long())


def test_a_dtype_that_numpy_lacks_comes_back_too(tmp_path):
    taken = Collector(3)
    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    with engine_of(ROUNDED, lambda inputs: {"y": inputs["x"] * 2}) as engine:
        system = SystemUnderTest(engine, Dataset({"x": x}, None, 3), taken.complete, taken.fail)
        system.issue(range(3), range(3))
        assert taken.done.wait(30)
    assert not taken.errors
    entries = [{"seq_id": n, "qsl_idx": n, "data": data.hex()} for n, data in taken.answers.items()]
    (tmp_path / "mlperf_log_accuracy.json").write_text(json.dumps(entries))
    assert torch.equal(read_answers(tmp_path, system.fields, 3)["y"], x * 2)


@pytest.mark.parametrize("in_bulk", [False, True])
def test_a_model_that_fails_is_told_and_nothing_is_completed(in_bulk):
    def broken(inputs):
        if float(inputs["x"].max()) >= 7000:  # not while the engine warms up
            raise RuntimeError("no such luck")
        return {"y": inputs["x"]}

    taken = Collector(40)
    with engine_of(compute=broken) as engine:
        system = SystemUnderTest(engine, dataset(40), taken.complete, taken.fail, in_bulk)
        system.issue(range(40), range(40))
        assert taken.done.wait(30)
        system.close()
    assert taken.answers == {}
    assert isinstance(taken.errors[0], EngineError)
    assert "no such luck" in str(taken.errors[0])


@pytest.mark.parametrize("text", ["x: float32[4,3]", "x: float32[B,3], B=2..8"])
def test_a_model_that_takes_no_single_row_is_refused(text):
    spec = parse_spec([text])
    first = spec.inputs[0].shape[0]
    spec = msgspec.structs.replace(spec, outputs=(TensorSpec("y", "float32", (first, 3)),))
    with pytest.raises(UsageError, match="a sample is one row"):
        rows_per_request(spec)


def test_a_log_that_is_not_whole_is_an_error(tmp_path):
    fields = (AnswerField("y", "float32", (1,)),)
    path = tmp_path / "mlperf_log_accuracy.json"
    with pytest.raises(EngineError, match="cannot be read"):
        read_answers(tmp_path, fields, 2)
    path.write_text('[{"seq_id": 0, "qsl_idx": 0, "data": "0000803F"}')
    with pytest.raises(EngineError, match="cannot be read"):
        read_answers(tmp_path, fields, 2)
    path.write_text('[{"seq_id": 0, "qsl_idx": 0, "data": "0000803F"}]')
    with pytest.raises(EngineError, match="answers for 1 of 2 samples"):
        read_answers(tmp_path, fields, 2)
    assert read_answers(tmp_path, fields, 1)["y"].tolist() == [[1.0]]
    with pytest.raises(EngineError, match="have \\[4\\] bytes, expected 8"):
        read_answers(tmp_path, (AnswerField("y", "float32", (2,)),), 1)

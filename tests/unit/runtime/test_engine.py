import asyncio
import gc
import threading
import time
import warnings
import weakref
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from onecard.bundle.open import OnecardWarning
from onecard.errors import (
    DeadlineError,
    DeviceMemoryError,
    EngineClosedError,
    EngineError,
    QueueFullError,
    SpecError,
    UsageError,
)
from onecard.runtime.dispatch import fail
from onecard.runtime.engine import Engine, EngineOptions
from onecard.runtime.ingest import Cast
from onecard.runtime.lane import Lane
from onecard.runtime.limits import BatchPolicy
from onecard.runtime.null import NullModel
from onecard.runtime.staging import CpuStage
from onecard.runtime.work import Work
from onecard.spec import TensorSpec, parse_spec
from tests.unit.runtime.null_specs import ALONE, ROWS, TOKENS, engine_of, policy, rows_of, twice_and_one

GOLDEN = Path(__file__).parents[2] / "golden" / "bundle-v1"


class Gate:
    """A model that waits to be let on, so that a test decides what is queued meanwhile."""

    def __init__(self) -> None:
        self.open, self.entered = threading.Event(), threading.Event()
        self.batches: list[int] = []
        self.first_rows: list[float] = []

    def __call__(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.batches.append(len(inputs["x"]))
        self.first_rows.append(float(inputs["x"][0, 0]))
        self.entered.set()
        assert self.open.wait(30)
        return twice_and_one(inputs)


def gated(options: EngineOptions | None = None, **more: object) -> tuple[Engine, Gate]:
    """An engine whose lane is already held in its model by a first request."""
    gate = Gate()
    gate.open.set()
    engine = engine_of(compute=gate, options=options, **more)
    gate.batches.clear(), gate.first_rows.clear(), gate.entered.clear(), gate.open.clear()
    engine.submit({"x": rows_of(-1, 1)})
    assert gate.entered.wait(30)
    gate.batches.clear(), gate.first_rows.clear()
    return engine, gate


request = st.tuples(st.integers(1, 90), st.integers(0, 2), st.sampled_from(["a", "b", "c"]), st.booleans())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(request, min_size=1, max_size=40),
    st.sampled_from([(), (1, 8, 64)]),
    st.sampled_from([1, 2]),
    st.booleans(),
)
def test_everyone_gets_their_own_answer_in_any_interleaving(requests, batches, lanes, delayed):
    options = policy(max_rows=64, max_delay_s=0.002 if delayed else 0.0)
    with (
        engine_of(options=options, batches=batches, lanes=lanes, delay_s=0.0005) as engine,
        ThreadPoolExecutor(8) as pool,
    ):

        def ask(tag: int) -> object:
            rows, priority, client, cancelled = requests[tag]
            answer = engine.submit({"x": rows_of(tag, rows)}, priority=priority, client=client)
            if cancelled and answer.cancel():
                return None
            return answer.result(30)["y"]

        answers = list(pool.map(ask, range(len(requests))))
    for tag, answer in enumerate(answers):
        if answer is None:
            assert requests[tag][3]
        else:
            np.testing.assert_array_equal(answer, rows_of(tag, requests[tag][0]) * 2 + 1)
    assert engine.queued == (0, 0, 0)


def test_requests_that_wait_share_a_batch():
    engine, gate = gated(policy(max_rows=8))
    answers = [engine.submit({"x": rows_of(tag, 3)}) for tag in range(4)]
    gate.open.set()
    for tag, answer in enumerate(answers):
        np.testing.assert_array_equal(answer.result(30)["y"], rows_of(tag, 3) * 2 + 1)
    engine.close()
    assert gate.batches == [8, 4]  # the third request is answered by both


def test_a_request_larger_than_any_batch():
    with engine_of(options=policy(max_rows=8), batches=(8,)) as engine:
        answer = engine.submit({"x": rows_of(1, 100)})
        np.testing.assert_array_equal(answer.result(30)["y"], rows_of(1, 100) * 2 + 1)
        assert answer.timing is not None
        assert answer.timing.batches == 13
        assert 0 <= answer.timing.queue_s <= answer.timing.total_s


def test_a_model_without_a_batch_dimension_answers_one_at_a_time():
    with engine_of(ALONE) as engine:
        for value in (1.0, 2.0):
            x = np.full(3, value, dtype=np.float32)
            np.testing.assert_array_equal(engine.infer({"x": x})["y"], x * 2 + 1)


def test_what_is_padded_is_cut_off_again():
    class Padded(NullModel):
        def lengths_of(self, lengths):
            return (16,) if lengths[0] <= 16 else (64,)

        def joins(self, a, b):
            return a[0] <= b[0]

        def fit(self, rows, lengths):
            return {"B": 8, "S": self.lengths_of(lengths)[0]}

        def steps(self, lengths):
            return (8,)

    sizes = []

    def double(inputs):
        sizes.append(tuple(inputs["ids"].shape))
        return {"twice": inputs["ids"] * 2}

    stats = []
    with Engine([Padded(TOKENS, (8,), double)], policy(max_delay_s=0.05), stats.append) as engine:
        ids = [np.arange(1, length + 1)[None] for length in (3, 16, 40)]
        answers = [engine.submit({"ids": i}) for i in ids]
        for i, answer in zip(ids, answers, strict=True):
            np.testing.assert_array_equal(answer.result(30)["twice"], i * 2)
    assert {shape[1] for shape in sizes} <= {16, 64}
    assert sum(s.rows for s in stats) == 3
    assert all(0 < s.padding < 1 for s in stats)


def test_answers_are_the_callers_own():
    buffer = torch.zeros(200, 3)

    def same_buffer(inputs):
        part = buffer[: len(inputs["x"])]
        part.copy_(inputs["x"])
        return {"y": part.clone()}

    with engine_of(compute=same_buffer) as engine:
        first = engine.infer({"x": rows_of(1, 2)})["y"]
        first += 1
        second = engine.infer({"x": rows_of(2, 2)})["y"]
        np.testing.assert_array_equal(first, rows_of(1, 2) + 1)
        np.testing.assert_array_equal(second, rows_of(2, 2))


def test_a_model_that_gives_its_input_back_does_not_give_the_callers_memory():
    with engine_of(compute=lambda inputs: {"y": inputs["x"]}) as engine:
        mine = rows_of(1, 2)
        answer = engine.infer({"x": mine})["y"]
        answer += 5
        np.testing.assert_array_equal(mine, rows_of(1, 2))


def test_tensors_in_tensors_out_and_bfloat16():
    spec = msgspec.structs.replace(
        parse_spec(["x: bfloat16[B,3], B=1..8"]), outputs=(TensorSpec("y", "bfloat16", ("B", 3)),)
    )
    with engine_of(spec, lambda inputs: {"y": inputs["x"] * 2}) as engine:
        x = torch.arange(6).reshape(2, 3).bfloat16()
        answer = engine.infer({"x": x})["y"]
        assert isinstance(answer, torch.Tensor)
        assert torch.equal(answer, x * 2)


def test_narrower_numbers_than_the_model_takes():
    options = EngineOptions(ingest=(Cast("ids", "int32"),))
    with engine_of(TOKENS, lambda inputs: {"twice": inputs["ids"] * 2}, options) as engine:
        ids = np.arange(12, dtype=np.int32).reshape(2, 6)
        assert engine.infer({"ids": ids})["twice"].tolist() == (ids * 2).tolist()
        assert engine.infer({"ids": ids.astype(np.int64)})["twice"].dtype == np.int64
        with pytest.raises(SpecError, match=r"int16, expected ids.*or int32"):
            engine.infer({"ids": ids.astype(np.int16)})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "takes inputs"),
        ({"x": rows_of(0, 1), "z": rows_of(0, 1)}, "no input .z."),
        ({"x": [[1.0, 2.0, 3.0]]}, "is a list, expected"),
        ({"x": rows_of(0, 1).astype(np.float64)}, "is float64, expected x: float32"),
        ({"x": rows_of(0, 1)[:, :2]}, "has size 2 in dimension 1"),
        ({"x": rows_of(0, 201)}, "outside the range"),
        ({"x": rows_of(0, 1)[0]}, "has 1 dimensions"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_and_nothing_waits(inputs, message):
    with engine_of() as engine:
        with pytest.raises(SpecError, match=message):
            engine.infer(inputs)
        assert engine.queued == (0, 0, 0)


def test_a_deadline_that_passes_while_waiting():
    engine, gate = gated()
    late = engine.submit({"x": rows_of(1, 1)}, timeout_s=0.05)
    kept = engine.submit({"x": rows_of(2, 1)})
    time.sleep(0.1)
    gate.open.set()
    with pytest.raises(DeadlineError, match="deadline passed"):
        late.result(30)
    np.testing.assert_array_equal(kept.result(30)["y"], rows_of(2, 1) * 2 + 1)
    engine.close()
    assert 1004.0 not in gate.first_rows


def test_a_batch_is_run_in_time_for_a_deadline_though_it_might_wait_for_others():
    with engine_of(options=policy(max_delay_s=300.0, margin_s=59.7)) as engine:
        began = time.monotonic()
        answer = engine.submit({"x": rows_of(1, 1)}, timeout_s=60.0)
        answer.result(60)  # run in time for its deadline, though it might have waited five minutes for company
        assert time.monotonic() - began < 50


def test_bounds_of_the_queue():
    engine, gate = gated(policy(queue_items=2))
    waiting = [engine.submit({"x": rows_of(tag, 1)}) for tag in range(2)]
    with pytest.raises(QueueFullError, match="2 requests wait") as refused:
        engine.submit({"x": rows_of(9, 1)})
    assert refused.value.retry_after_s >= 0
    assert waiting[0].cancel()
    more = engine.submit({"x": rows_of(3, 1)})
    gate.open.set()
    np.testing.assert_array_equal(more.result(30)["y"], rows_of(3, 1) * 2 + 1)
    engine.close()


def test_a_cancelled_request_is_never_run():
    engine, gate = gated()
    doomed = engine.submit({"x": rows_of(7, 1)})
    assert doomed.cancel()
    assert engine.queued == (0, 0, 0)
    gate.open.set()
    with pytest.raises(CancelledError):
        doomed.result(30)
    engine.infer({"x": rows_of(8, 1)})
    engine.close()
    assert 7000.0 not in gate.first_rows


def test_one_poisoned_request_fails_alone():
    def poisoned(inputs):
        if bool((inputs["x"] == 5000.0).any()):
            raise ValueError("a row I cannot bear")
        return twice_and_one(inputs)

    stats = []
    with engine_of(compute=poisoned, options=policy(max_delay_s=0.05), on_batch=stats.append) as engine:
        answers = [engine.submit({"x": rows_of(tag, 2)}) for tag in (4, 5, 6)]
        with pytest.raises(EngineError, match="a row I cannot bear") as failed:
            answers[1].result(30)
        assert isinstance(failed.value.__cause__, ValueError)
        np.testing.assert_array_equal(answers[0].result(30)["y"], rows_of(4, 2) * 2 + 1)
        np.testing.assert_array_equal(answers[2].result(30)["y"], rows_of(6, 2) * 2 + 1)
        np.testing.assert_array_equal(engine.infer({"x": rows_of(1, 1)})["y"], rows_of(1, 1) * 2 + 1)
    assert any("a row I cannot bear" in s.error for s in stats)


@pytest.mark.parametrize("batches", [(), (1, 8, 16, 64)])
def test_out_of_memory_makes_the_batches_smaller_and_loses_nothing(batches):
    room = [64]
    largest = []

    def limited(inputs):
        rows = len(inputs["x"])
        if rows > room[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        largest.append(rows)
        return twice_and_one(inputs)

    stats = []
    with engine_of(compute=limited, options=policy(max_rows=64), batches=batches, on_batch=stats.append) as engine:
        assert engine.skipped == []
        room[0] = 20
        largest.clear()
        answers = [engine.submit({"x": rows_of(tag, 30)}) for tag in range(6)]
        for tag, answer in enumerate(answers):
            np.testing.assert_array_equal(answer.result(30)["y"], rows_of(tag, 30) * 2 + 1)
    assert max(largest) <= 20
    if not batches:  # among buckets the batcher may have found 16 rows at a time to be faster anyway
        assert any(s.error == "out of memory" for s in stats)


def test_a_size_that_does_not_fit_is_ruled_out_before_the_first_request():
    def limited(inputs):
        if len(inputs["x"]) > 8:
            raise MemoryError
        return twice_and_one(inputs)

    with engine_of(compute=limited, options=policy(max_rows=64), batches=(1, 8, 64)) as engine:
        assert engine.skipped == ["B64 does not fit in the device's memory"]
        np.testing.assert_array_equal(engine.infer({"x": rows_of(1, 50)})["y"], rows_of(1, 50) * 2 + 1)


def test_nothing_fits():
    def never(inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(DeviceMemoryError, match=r"not even at B1\b.*onecard plan"):
        engine_of(compute=never, options=policy(max_rows=4), batches=(1, 4))


def test_answers_that_are_not_what_the_spec_says():
    with (
        engine_of(compute=lambda inputs: {"y": inputs["x"], "z": inputs["x"]}) as engine,
    ):
        assert set(engine.infer({"x": rows_of(0, 1)})) == {"y"}
    replies = [{"y": torch.zeros(200, 3)}]

    def forgets(inputs):
        return replies[0]

    with engine_of(compute=forgets) as engine:
        replies[0] = {"other": torch.zeros(1, 3)}
        with pytest.raises(EngineError, match="failed on this input"):
            engine.infer({"x": rows_of(0, 1)})
        replies[0] = {"y": torch.zeros(1, 3)}
        assert engine.infer({"x": rows_of(0, 1)})["y"].shape == (1, 3)


def test_a_lost_device_fails_what_waits_and_what_comes():
    broken = [False]

    def dies(inputs):
        if broken[0]:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return twice_and_one(inputs)

    engine = engine_of(compute=dies)
    assert engine.healthy
    broken[0] = True
    with pytest.raises(EngineError, match="illegal memory access"):
        engine.infer({"x": rows_of(0, 1)})
    with pytest.raises(EngineError, match="illegal memory access"):
        engine.infer({"x": rows_of(0, 1)})
    assert not engine.healthy
    engine.close()


def test_event_loops():
    async def ask(engine, tag):
        answer = await engine.infer_async({"x": rows_of(tag, 2)}, client=str(tag % 3))
        np.testing.assert_array_equal(answer["y"], rows_of(tag, 2) * 2 + 1)
        return tag

    async def main():
        with engine_of(options=policy(max_rows=16)) as engine:
            assert await asyncio.gather(*(ask(engine, tag) for tag in range(200))) == list(range(200))
            with pytest.raises(SpecError):
                await engine.infer_async({})

    asyncio.run(main())
    asyncio.run(main())  # in another loop


def test_a_cancelled_task_cancels_its_request():
    engine, gate = gated()

    async def main():
        task = asyncio.create_task(engine.infer_async({"x": rows_of(7, 1)}))
        await asyncio.sleep(0.05)
        assert engine.queued[0] == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.queued == (0, 0, 0)

    asyncio.run(main())
    gate.open.set()
    engine.close()
    assert 7000.0 not in gate.first_rows


def test_closing_answers_what_waits():
    engine, gate = gated()
    answers = [engine.submit({"x": rows_of(tag, 1)}) for tag in range(5)]
    threading.Timer(0.05, gate.open.set).start()
    engine.close()
    for tag, answer in enumerate(answers):
        np.testing.assert_array_equal(answer.result(0)["y"], rows_of(tag, 1) * 2 + 1)
    with pytest.raises(EngineClosedError):
        engine.submit({"x": rows_of(0, 1)})
    engine.close()


def test_closing_at_once_fails_what_waits():
    engine, gate = gated()
    answers = [engine.submit({"x": rows_of(tag, 1)}) for tag in range(5)]
    answers[0].add_done_callback(lambda _: gate.open.set())  # not before: what is let on would be answered
    engine.close(drain_s=0.0)
    for answer in answers:
        with pytest.raises(EngineClosedError, match="before it could answer"):
            answer.result(0)


class LateStage(CpuStage):
    """Its answers are waited for on another thread, and the first is a failure."""

    synchronous = False
    depth = 2

    def __init__(self, model, options):
        super().__init__(model, [{"B": 64}])
        self.armed = False
        self.go = threading.Event()
        self.asked = threading.Event()

    def launch(self, sources, rows, size):
        flight = super().launch(sources, rows, size)
        if self.armed:
            self.armed = False
            flight.wait = self._fail
        return flight

    def _fail(self):
        self.asked.set()
        assert self.go.wait(30)
        raise ValueError("found out late")


def test_an_engine_that_closes_waits_for_what_must_be_run_again():
    stages = []

    def make_stage(model, options):
        stages.append(LateStage(model, options))
        return stages[0]

    engine = Engine([NullModel(ROWS, compute=twice_and_one)], policy(max_rows=6, max_delay_s=60.0), None, make_stage)
    stages[0].armed = True
    answers = [engine.submit({"x": rows_of(tag, 2)}) for tag in range(3)]  # fill the batch that fails
    assert stages[0].asked.wait(30)
    closing = threading.Thread(target=engine.close)
    closing.start()
    time.sleep(0.1)  # the launching thread finds an empty queue and a closing engine
    stages[0].go.set()
    closing.join(30)
    for tag, answer in enumerate(answers):
        np.testing.assert_array_equal(answer.result(0)["y"], rows_of(tag, 2) * 2 + 1)


def test_a_request_that_was_cancelled_while_its_deadline_passed_is_left_alone():
    work = Work(1, request=None)
    fail(work, DeadlineError("late"))
    assert work.gone


def test_a_fault_of_the_engines_own_fails_its_callers_instead_of_hanging(monkeypatch, caplog):
    with engine_of() as engine:
        monkeypatch.setattr(Lane, "_launch", lambda self, batch: 1 / 0)
        for tag in range(3):
            with pytest.raises(EngineError, match="the engine itself failed"):
                engine.submit({"x": rows_of(tag, 1)}).result(30)
        assert not engine.healthy
    assert "failed" in caplog.text


def test_priorities_and_fairness_reach_the_card_in_order():
    engine, gate = gated(policy(max_rows=1))
    for tag in range(3):
        engine.submit({"x": rows_of(tag, 1)}, priority=1, client="many")
    engine.submit({"x": rows_of(10, 1)}, priority=1, client="one")
    engine.submit({"x": rows_of(20, 1)}, priority=0)
    gate.open.set()
    engine.close()
    assert gate.first_rows[0] == 20000.0
    assert gate.first_rows.index(10000.0) <= 2
    assert [row for row in gate.first_rows if row < 3000.0] == [0.0, 1000.0, 2000.0]


def test_another_policy_for_the_same_models():
    sizes = []
    with engine_of(options=policy(max_rows=16), on_batch=lambda s: sizes.append(s.rows)) as engine:
        engine.reconfigure(BatchPolicy(max_rows=4))
        np.testing.assert_array_equal(engine.infer({"x": rows_of(1, 10)})["y"], rows_of(1, 10) * 2 + 1)
        with pytest.raises(UsageError, match="at most 16 rows"):
            engine.reconfigure(BatchPolicy(max_rows=32))
    assert sizes == [4, 4, 2]


def test_observers_hear_of_every_batch_and_cannot_harm():
    stats = []

    def observe(batch):
        stats.append(batch)
        raise RuntimeError("the observer's own trouble")

    with engine_of(options=policy(max_rows=8), batches=(8,), on_batch=observe) as engine:
        for tag in range(3):
            engine.infer({"x": rows_of(tag, 6)})
    assert [(s.variant, s.size, s.rows, s.requests, s.padding) for s in stats] == [("null", {"B": 8}, 6, 1, 0.25)] * 3
    assert all(s.total_s >= s.compute_s >= 0 and len(s.queue_s) == 1 for s in stats)


@pytest.fixture
def no_garbage_collection():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_request_is_forgotten_at_once_and_not_at_the_next_garbage_collection(no_garbage_collection):
    def poisoned(inputs):
        if bool((inputs["x"] == 9000.0).any()):
            raise ValueError("no")
        return twice_and_one(inputs)

    with engine_of(compute=poisoned, options=policy(queue_items=3)) as engine:
        seen = []
        for tag in (1, 9, 2):  # answered, failed, answered
            mine = rows_of(tag, 2)
            seen.append(weakref.ref(mine))
            answer = engine.submit({"x": mine})
            answer.exception(30)
            del mine, answer
        end = time.monotonic() + 30
        while any(ref() is not None for ref in seen) and time.monotonic() < end:
            time.sleep(0.01)  # the lane lets go of its last batch just behind the answer
        assert [ref() is None for ref in seen] == [True, True, True]


def test_what_was_cancelled_or_refused_is_forgotten_too(no_garbage_collection):
    engine, gate = gated(policy(queue_items=1))
    cancelled, refused = rows_of(1, 2), rows_of(2, 2)
    seen = [weakref.ref(cancelled), weakref.ref(refused)]
    answer = engine.submit({"x": cancelled})
    with pytest.raises(QueueFullError):
        engine.submit({"x": refused})
    assert answer.cancel()
    del cancelled, refused, answer
    assert [ref() is None for ref in seen] == [True, True]
    gate.open.set()
    engine.close()


def test_a_real_bundle_on_two_lanes_answers_as_the_original_did():
    golden = load_file(GOLDEN / "golden.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OnecardWarning)  # an engine may be missing here: the next variant serves
        engine = Engine.open(GOLDEN, "cpu", EngineOptions(lanes=2))
    with engine:
        image, expected = golden["in.image"], golden["out.output"]
        answers = [engine.submit({"image": np.repeat(image, rows, axis=0)}) for rows in (1, 2, 3, 4, 1, 2)]
        for answer, rows in zip(answers, (1, 2, 3, 4, 1, 2), strict=True):
            np.testing.assert_allclose(
                answer.result(60)["output"], np.repeat(expected, rows, axis=0), rtol=1e-3, atol=1e-4
            )


def test_memory_is_reported():
    engine, gate = gated()
    mine = engine.submit({"x": rows_of(1, 4)})
    assert engine.memory.queued_bytes == rows_of(1, 4).nbytes
    assert engine.memory.reserved_bytes == engine.memory.pinned_bytes == 0  # there is no card
    gate.open.set()
    mine.result(30)
    assert engine.memory.queued_bytes == 0
    engine.close()


def test_options_that_make_no_sense():
    with pytest.raises(UsageError, match="depth"):
        EngineOptions(depth=0)
    with pytest.raises(UsageError, match="timeout_s"):
        EngineOptions(timeout_s=-1.0)

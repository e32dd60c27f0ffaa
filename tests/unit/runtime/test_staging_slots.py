"""Slot memory: buffers that never overlap, padding that is always zero, and the roads that rows take."""

from __future__ import annotations

import gc
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from onecard.errors import EngineError
from onecard.runtime.entries import Source, capacities, make_entries, raw_name
from onecard.runtime.ingest import Cast, Picture
from onecard.runtime.roads import DIRECT_BYTES, Load, load_rows
from onecard.runtime.slots import ALIGNMENT_BYTES, Padding, Slab, as_array, as_tensor, lay_out, part, put
from onecard.spec import Bucket, parse_spec

BOUND = 3 * 6 * 5 * 4


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may stall
@given(st.dictionaries(st.text(min_size=1), st.integers(0, 10_000), min_size=1))
def test_buffers_lie_behind_each_other_and_aligned(nbytes: dict[str, int]) -> None:
    offsets, total = lay_out(nbytes)
    ends = [offsets[name] + size for name, size in nbytes.items()]
    assert all(offset % ALIGNMENT_BYTES == 0 for offset in offsets.values())
    assert all(end <= begin for end, begin in zip(ends, list(offsets.values())[1:], strict=False))
    assert max(ends) <= total < sum(nbytes.values()) + ALIGNMENT_BYTES * len(nbytes)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may stall
@given(
    st.lists(
        st.tuples(
            st.sampled_from([(3, 6, 5), (6, 3, 2), (2, 6, 1), (3,), (4, 5)]),
            st.lists(st.tuples(st.integers(1, 3), st.floats(0, 1), st.floats(0, 1)), max_size=4),
        ),
        max_size=8,
    )
)
def test_whatever_was_there_before_all_that_is_not_written_is_zero(batches: list) -> None:
    memory = torch.full((BOUND,), 0x7B, dtype=torch.uint8)
    slab = Slab(memory, {"x": 0}, {"x": BOUND})
    padding = Padding(dirty_bytes=BOUND)
    for shape, callers in batches:
        view = slab.view("x", torch.float32, shape).tensor
        expected = torch.zeros(shape)
        row = 0
        for rows, *shares in callers:
            rows = min(rows, shape[0] - row)  # noqa: PLW2901 - as many as there is room for
            extents = tuple(max(1, round(share * n)) for share, n in zip(shares, shape[1:], strict=False))
            padding.claim(view, row, rows, extents)
            view[part(row, rows, extents)] = expected[part(row, rows, extents)] = float(row + 1)
            row += rows
        padding.finish(view, row)
        assert torch.equal(view, expected)


def test_what_no_batch_wrote_is_not_zeroed_again() -> None:
    view = torch.zeros(8, 4)
    padding = Padding()
    for _ in range(2):
        padding.claim(view, 0, 2, (4,))
        padding.finish(view, 2)
        view[2:] = 7  # would be zeroed if it were visited
    assert view[2:].eq(7).all()
    padding.claim(view, 0, 1, (3,))
    padding.finish(view, 1)
    assert view[0, 3] == 0
    assert not view[1].any()
    assert view[2:].eq(7).all()


def test_a_buffer_is_not_read_beyond_its_end() -> None:
    slab = Slab(torch.zeros(512, dtype=torch.uint8), {"x": 0, "y": 256}, {"x": 16, "y": 16})
    assert slab.view("y", torch.float32, (4,)).tensor.data_ptr() == slab.bytes("x", 0, 4).data_ptr() + 256
    with pytest.raises(EngineError, match="'x' needs 20 bytes of a staging buffer of 16"):
        slab.view("x", torch.float32, (5,))


@pytest.mark.parametrize("rows", [3, 40_000])  # 40,000 rows are copied by several threads
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.bool, torch.int64])
def test_rows_are_put_where_they_belong(dtype: torch.dtype, rows: int) -> None:
    source = torch.randint(0, 2, (rows, 11)).to(dtype)
    nbytes = (rows + 2) * 12 * dtype.itemsize
    slab = Slab(torch.zeros(nbytes, dtype=torch.uint8), {"x": 0}, {"x": nbytes})
    buffer = slab.view("x", dtype, (rows + 2, 12))
    put(buffer, 1, source)
    assert torch.equal(buffer.tensor[1:-1, :11], source)
    assert not buffer.tensor[[0, -1]].any()
    assert not buffer.tensor[:, 11].any()
    if dtype != torch.bfloat16:
        put(buffer, 2, source.numpy()[::-1])
        assert torch.equal(buffer.tensor[2:, :11], source.flip(0))


def test_a_read_only_array_becomes_a_tensor_over_the_same_memory_without_a_warning() -> None:
    array = np.frombuffer(np.arange(6, dtype=np.float32).tobytes(), np.float32).reshape(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = as_tensor(array)
        assert tensor.data_ptr() == array.ctypes.data
        del array
        gc.collect()
        assert torch.equal(tensor, torch.arange(6.0).view(2, 3))
        nothing = np.zeros((0, 3))
        nothing.flags.writeable = False
        assert as_tensor(nothing).shape == (0, 3)
    misaligned = np.frombuffer(b"x" + np.arange(3, dtype=np.int64).tobytes(), np.int64, offset=1)
    assert as_tensor(misaligned).tolist() == [0, 1, 2]
    assert as_array(torch.ones(2, dtype=torch.bfloat16)).dtype == np.int16


PICTURES = parse_spec(["image: float32[B,3,H,W], B=1..8, H=1..64, W=1..64"])
LARGE: Bucket = {"B": 8, "H": 64, "W": 64}


def load(sources: list[Source], readable: bool, size: Bucket = LARGE) -> Load:
    (entry,) = make_entries(PICTURES, [Picture("image")])
    bounds = capacities([entry], [LARGE])
    offsets, nbytes = lay_out(bounds)
    slab = Slab(torch.zeros(nbytes, dtype=torch.uint8), offsets, bounds)
    assert raw_name(entry) in bounds
    return load_rows(entry, sources, size, (slab, Padding()), lambda tensor: readable)


def floats(rows: int, height: int = 64) -> Source:
    return Source({"image": torch.ones(rows, 3, height, 64)}, 0, rows)


def raws(rows: int, height: int = 64) -> Source:
    return Source({"image": np.ones((rows, height, 64, 3), np.uint8)}, 0, rows)


def copies(load: Load) -> list[tuple[str, int]]:
    return [(move.buffer, move.stop - move.start) for move in load.moves]


def test_rows_of_many_callers_are_one_copy() -> None:
    done = load([floats(1), floats(2), floats(3)], readable=False)
    assert copies(done) == [("image", 6 * 3 * 64 * 64 * 4)]
    assert [(s.row, s.rows, s.raw) for s in done.stretches] == [(0, 6, None)]


def test_rows_that_the_card_can_read_are_not_touched() -> None:
    sources = [floats(1), floats(2)]
    done = load(sources, readable=True)
    addresses = [source.inputs["image"].data_ptr() for source in sources]
    assert [move.host.data_ptr() for move in done.moves] == addresses
    assert copies(done) == [("image", 49152), ("image", 98304)]


def test_raw_rows_of_many_callers_are_one_copy_and_one_conversion() -> None:
    done = load([raws(1), raws(2)], readable=False)
    assert copies(done) == [("image (raw)", 3 * 3 * 64 * 64)]
    assert [(s.row, s.rows, s.raw) for s in done.stretches] == [(0, 3, (0, (3, 64, 64, 3)))]


def test_smaller_pictures_are_converted_each_by_itself() -> None:
    done = load([raws(2, 32), raws(1), floats(1, 32)], readable=False)
    row = 3 * 64 * 64
    assert copies(done) == [("image (raw)", row), ("image (raw)", row), ("image", row * 4)]  # a gap behind the first
    assert [(s.row, s.rows, s.extents, s.raw) for s in done.stretches] == [
        (0, 2, (3, 32, 64), (0, (2, 32, 64, 3))),
        (2, 1, (3, 64, 64), (2 * row, (1, 64, 64, 3))),
        (3, 1, (3, 64, 64), None),
    ]


def test_smaller_pictures_of_one_size_lie_apart_and_are_not_converted_as_one() -> None:
    done = load([raws(1, 32), raws(2, 32)], readable=False)
    row = 3 * 64 * 64
    assert [(move.start, move.stop) for move in done.moves] == [(0, row // 2), (row, 2 * row)]
    assert [s.raw for s in done.stretches] == [(0, (1, 32, 64, 3)), (row, (2, 32, 64, 3))]


def test_a_few_bytes_are_collected_though_the_card_could_read_them() -> None:
    size = {"B": 8, "H": 1, "W": 1}
    source = Source({"image": torch.ones(1, 3, 1, 1)}, 0, 1)
    assert source.inputs["image"].nbytes < DIRECT_BYTES
    assert copies(load([source] * 4, readable=True, size=size)) == [("image", 4 * 12)]


def test_a_layout_that_cannot_be_copied_as_it_lies_is_collected() -> None:
    channels_last: Tensor = torch.ones(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    done = load([Source({"image": channels_last}, 0, 2)], readable=True)
    assert done.moves[0].host.data_ptr() != channels_last.data_ptr()


def test_entries_know_both_forms() -> None:
    spec = parse_spec(["ids: int64[S], S=1..8", "scale: float32[]"])
    entry, scale = make_entries(spec, [Cast("ids", "int32")])
    assert not entry.batched
    assert entry.shape({"S": 8}) == entry.raw_shape({"S": 8}) == (1, 8)
    assert capacities([entry, scale], [{"S": 2}, {"S": 8}]) == {"ids": 64, "ids (raw)": 32, "scale": 4}
    raw = entry.rows(Source({"ids": np.arange(3, dtype=np.int32)}, 0, 1))
    assert entry.is_raw(raw)
    assert entry.extents(raw) == (3,)

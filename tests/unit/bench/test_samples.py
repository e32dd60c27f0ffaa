"""Inputs made from a description, or cut from the user's rows; metadata as a spec; answers out of bytes."""

from __future__ import annotations

import numpy as np
import pytest

from onecard.bench.http_answers import AnswerReader, MalformedAnswerError
from onecard.bench.metadata import protocol_spec
from onecard.bench.samples import cut_samples, draw_samples, sizes_of
from onecard.errors import DataError, UsageError
from onecard.spec import parse_spec

TEXT = protocol_spec([("ids", "INT64", [-1, -1]), ("mask", "INT64", [-1, -1])])
FIXED = protocol_spec([("x", "FP32", [3, 4])])


def test_metadata_becomes_a_spec():
    assert str(TEXT).startswith("ids: int64[rows,ids:1], mask: int64[rows,mask:1]")
    assert FIXED.symbols == {}
    with pytest.raises(UsageError, match="BYTES"):
        protocol_spec([("s", "BYTES", [1])])
    with pytest.raises(UsageError):
        protocol_spec([])


@pytest.mark.parametrize(
    ("dimensions", "expected"),
    [(["S=7"], (7, 7)), (["ids=5", "mask=6"], (5, 6)), (["ids:1=5", "S=9"], (5, 9))],
)
def test_open_dimensions_are_given(dimensions, expected):
    assert tuple(sizes_of(TEXT, 4, dimensions).values()) == (4, *expected)


def test_the_symbols_of_a_bundle():
    spec = parse_spec(["ids: int64[B,S], B=1..8, S=1..16"])
    assert sizes_of(spec, 3, ["S=16"]) == {"B": 3, "S": 16}
    for rows, given in ((9, ["S=4"]), (1, []), (1, ["S=17"]), (1, ["S=4", "T=4"]), (1, ["S"]), (1, ["S=0"])):
        with pytest.raises(UsageError):
            sizes_of(spec, rows, given)
    with pytest.raises(UsageError, match="no batches"):
        sizes_of(FIXED, 2, [])


def test_random_inputs_follow_the_description():
    spec = parse_spec(
        ["x: float32[B,50]", "h: float16[B,2] in 3..4", "b: bfloat16[B,500]", "ids: int32[B,9] in 5..7",
         "mask: int64[B,9]", "flag: bool[B], B=1..8"]
    )  # fmt: skip
    first, second, *rest = draw_samples(spec, {"B": 4}, seed=3)
    assert {name: (a.dtype.name, a.shape) for name, a in first.items()} == {
        "x": ("float32", (4, 50)), "h": ("float16", (4, 2)), "b": ("int16", (4, 500)), "ids": ("int32", (4, 9)),
        "mask": ("int64", (4, 9)), "flag": ("bool", (4,)),
    }  # fmt: skip
    assert set(np.unique(first["ids"])) == {5, 6, 7} and (first["mask"] == 1).all()
    assert 3 <= first["h"].min() <= first["h"].max() <= 4
    brain = (first["b"].view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    assert 0.8 < brain.std() < 1.2
    assert not np.array_equal(first["x"], second["x"]) and len(rest) == 62
    assert np.array_equal(first["x"], draw_samples(spec, {"B": 4}, seed=3)[0]["x"])


def test_large_inputs_are_few():
    spec = parse_spec(["x: float32[B,3,2000,2000], B=1..8"])
    assert len(draw_samples(spec, {"B": 1})) == 2


def test_rows_are_cut_in_their_order():
    spec = parse_spec(["x: float32[B,2], B=1..8"])
    data = {"x": np.arange(10, dtype=np.float32).reshape(5, 2), "more": np.zeros(1)}
    cut = cut_samples(data, spec, {"B": 2})
    assert [c["x"][:, 0].tolist() for c in cut] == [[0, 2], [4, 6], [8, 0]]
    whole = cut_samples({"x": np.zeros((2, 3, 4), np.float32)}, FIXED, {})
    assert [c["x"].shape for c in whole] == [(3, 4)] * 2


@pytest.mark.parametrize(
    "data", [{}, {"x": np.zeros((5, 2))}, {"x": np.zeros((5, 3), np.float32)}, {"x": np.zeros((0, 2), np.float32)}]
)
def test_data_that_do_not_fit_are_refused(data):
    with pytest.raises(DataError):
        cut_samples(data, parse_spec(["x: float32[B,2], B=1..8"]), {"B": 2})


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"
CHUNKS = b"HTTP/1.1 503 X\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1;x=y\r\nc\r\n0\r\n\r\n"
SEVERAL = (
    (OK, 200, b"abc", False),
    (CHUNKS, 503, b"abc", False),
    (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, 200, b"abc", False),
    (b"HTTP/1.1 400 X\r\nConnection: close\r\nContent-Length: 1\r\n\r\nx", 400, b"x", True),
    (b"HTTP/1.1 204 X\r\n\r\n", 204, b"", False),
    (b"HTTP/1.1 200 X\r\ncontent-length:0\r\n\r\n", 200, b"", False),
)


@pytest.mark.parametrize(("wire", "status", "body", "closes"), SEVERAL)
@pytest.mark.parametrize("step", [1, 2, 7, 10_000])
def test_answers_are_read_however_they_come(wire, status, body, closes, step):
    reader = AnswerReader(keep=True)
    for _ in range(2):
        found = [reader.feed(wire[at : at + step]) for at in range(0, len(wire), step)]
        assert found[:-1] == [None] * (len(found) - 1)
        assert found[-1] == (status, body, closes)


def test_bodies_are_only_counted_where_nobody_wants_them():
    assert AnswerReader().feed(OK) == (200, b"", False)
    assert AnswerReader().feed(SEVERAL[3][0]).body == b"x", "those of errors are kept"


@pytest.mark.parametrize(
    "wire", [OK + b"H", b"SSH-2.0\r\n\r\n", b"HTTP/1.1 200 X\r\n\r\n", CHUNKS.replace(b"2\r\nab", b"zz\r\nab")]
)
def test_what_is_no_answer_is_refused(wire):
    with pytest.raises(MalformedAnswerError):
        AnswerReader().feed(wire)

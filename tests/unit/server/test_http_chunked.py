"""Chunked bodies: any split gives the same content, and what is not the grammar is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onecard.server.http_chunked import ChunkedBody
from onecard.server.http_types import HttpError, HttpLimits

LIMITS = HttpLimits(max_body_bytes=100_000, max_head_bytes=4096)


def fed(pieces: list[bytes]) -> tuple[ChunkedBody, bytes]:
    """Feed piece by piece, as a connection does with its inbox; the body and what is left over."""
    body, inbox = ChunkedBody(LIMITS), bytearray()
    for piece in pieces:
        inbox += piece
        del inbox[: body.feed(inbox, 0, len(inbox))]
    return body, bytes(inbox)


def coded(chunks: list[bytes], trailer: bytes = b"") -> bytes:
    return b"".join(b"%X\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n" + trailer + b"\r\n"


@settings(deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=40), max_size=6), st.data())
def test_any_split_gives_the_same(chunks, data):
    wire = coded(chunks, data.draw(st.sampled_from([b"", b"X: y\r\n", b"A:\r\nB: c\r\n"]))) + b"NEXT"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=10)))
    pieces = [wire[start:end] for start, end in zip([0, *cuts], [*cuts, len(wire)], strict=True)]
    body, rest = fed(pieces)
    assert body.done
    assert body.content == b"".join(chunks)
    assert rest == b"NEXT"


def test_extensions_are_read_past():
    body, rest = fed([b'3;a=b\r\nabc\r\n2 ; q="x"\r\nde\r\n000\r\n\r\n'])
    assert body.done
    assert (body.content, rest) == (b"abcde", b"")


WRONG = {
    "no size": b"\r\n",
    "letters": b"xyz\r\n",
    "a sign": b"+3\r\n",
    "a prefix": b"0x3\r\n",
    "a space before": b" 3\r\n",
    "a space after": b"3 \r\n",
    "an underscore": b"1_0\r\n",
    "a bare LF after the size": b"3\nabc\r\n",
    "a bare CR after the size": b"3\rabc\r\n",
    "a bare LF in an extension": b"3;a\nabc\r\n",
    "too many digits": b"0000000000000003\r\n",
    "a long extension": b"3;" + b"a" * 200,
    "a long extension, whole": b"3;" + b"a" * 200 + b"\r\n",
    "more than the size": b"3\r\nabcd\r\n",
    "a bare LF after the data": b"3\r\nabc\n",
    "a bare CR after the data": b"3\r\nabc\rx",
    "a folded trailer": b"0\r\nA: b\r\n c\r\n\r\n",
    "a trailer that is no field": b"0\r\nabc\r\n\r\n",
    "a long trailer": b"0\r\n" + b"A: b\r\n" * 1000,
    "a control byte": b"3;\0\r\n",
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("step", [1, 1000])
def test_what_is_refused(name, step):
    wire = WRONG[name]
    with pytest.raises(HttpError) as caught:
        fed([wire[start : start + step] for start in range(0, len(wire), step)])
    assert caught.value.status == 400


def test_too_much_is_refused_before_it_comes():
    with pytest.raises(HttpError) as caught:
        fed([b"186a1\r\n"])
    assert caught.value.status == 413
    with pytest.raises(HttpError) as caught:
        fed([b"7fffffffffffff\r\n"])
    assert caught.value.status == 413


def test_very_many_small_chunks_are_refused():
    with pytest.raises(HttpError, match="too many chunks"):
        fed([coded([b"a"] * 2000)])
    body, _ = fed([coded([b"a" * 64] * 1500)])
    assert body.done

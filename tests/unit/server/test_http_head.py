"""Heads by the letter of the RFCs: what is read, what is refused, and that llhttp reads the same."""

from __future__ import annotations

import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onecard.server.http_head import check_partial, parse_head
from onecard.server.http_types import HttpError, HttpLimits

LIMITS = HttpLimits(max_body_bytes=1000)


def head(line: str = "GET / HTTP/1.1", *fields: str, host: str | None = "Host: a") -> bytes:
    return "\r\n".join((line, *([host] if host is not None else []), *fields, "", "")).encode("latin-1")


def test_a_head_is_read():
    read = parse_head(
        head("POST /v2/a%20b?x=1&y=/? HTTP/1.1", "Content-Length:  12 ", "X-A: 1", "x-a: 2", "E:"), LIMITS
    )
    assert (read.method, read.path, read.query, read.minor) == ("POST", "/v2/a%20b", "x=1&y=/?", 1)
    assert read.headers == {b"host": b"a", b"content-length": b"12", b"x-a": b"1, 2", b"e": b""}
    assert (read.content_length, read.chunked, read.keep_alive) == (12, False, True)


@pytest.mark.parametrize(
    ("line", "fields", "keep"),
    [
        ("GET / HTTP/1.1", (), True),
        ("GET / HTTP/1.1", ("Connection: x, Close",), False),
        ("GET / HTTP/1.0", (), False),
        ("GET / HTTP/1.0", ("Connection: keep-alive",), True),
    ],
)
def test_keep_alive(line, fields, keep):
    assert parse_head(head(line, *fields), LIMITS).keep_alive is keep


def test_targets():
    assert parse_head(head("GET http://A/x?y HTTP/1.1"), LIMITS).path == "/x"
    assert parse_head(head("GET http://a HTTP/1.1"), LIMITS).path == "/"
    assert parse_head(head("OPTIONS * HTTP/1.1"), LIMITS).path == "*"
    assert parse_head(head("GET / HTTP/1.0", host=None), LIMITS).minor == 0
    for host in ("[::1]:8000", "a.b-c:80", "127.0.0.1", "model_server:8000"):
        parse_head(head(host=f"Host: {host}"), LIMITS)


REFUSED = {
    "two lengths": (400, head("POST / HTTP/1.1", "Content-Length: 1", "Content-Length: 2")),
    "one length twice": (400, head("POST / HTTP/1.1", "Content-Length: 1", "Content-Length: 1")),
    "a list of lengths": (400, head("POST / HTTP/1.1", "Content-Length: 1, 1")),
    "length and chunked": (400, head("POST / HTTP/1.1", "Content-Length: 1", "Transfer-Encoding: chunked")),
    "chunked and length": (400, head("POST / HTTP/1.1", "Transfer-Encoding: chunked", "Content-Length: 1")),
    "chunked twice": (400, head("POST / HTTP/1.1", "Transfer-Encoding: chunked", "Transfer-Encoding: chunked")),
    "a coding before chunked": (501, head("POST / HTTP/1.1", "Transfer-Encoding: gzip, chunked")),
    "a coding after chunked": (501, head("POST / HTTP/1.1", "Transfer-Encoding: chunked, identity")),
    "an unknown coding": (501, head("POST / HTTP/1.1", "Transfer-Encoding: xchunked")),
    "an empty coding": (501, head("POST / HTTP/1.1", "Transfer-Encoding:")),
    "a tab in the coding": (501, head("POST / HTTP/1.1", "Transfer-Encoding: chunked\tx")),
    "chunked in HTTP/1.0": (400, head("POST / HTTP/1.0", "Transfer-Encoding: chunked")),
    "a signed length": (400, head("POST / HTTP/1.1", "Content-Length: +1")),
    "a negative length": (400, head("POST / HTTP/1.1", "Content-Length: -1")),
    "a hexadecimal length": (400, head("POST / HTTP/1.1", "Content-Length: 0x1")),
    "an empty length": (400, head("POST / HTTP/1.1", "Content-Length:")),
    "a length with an underscore": (400, head("POST / HTTP/1.1", "Content-Length: 1_0")),
    "a length in other digits": (400, head("POST / HTTP/1.1", "Content-Length: \xb2")),
    "an endless length": (400, head("POST / HTTP/1.1", "Content-Length: " + "9" * 5000)),
    "too large a body": (413, head("POST / HTTP/1.1", "Content-Length: 1001")),
    "a folded line": (400, head("GET / HTTP/1.1", "X: a", " b")),
    "a folded first line": (400, b"GET / HTTP/1.1\r\n Host: a\r\n\r\n"),
    "a space before the colon": (400, head("GET / HTTP/1.1", "X : a")),
    "a tab before the colon": (400, head("POST / HTTP/1.1", "Content-Length\t: 1")),
    "a space in a name": (400, head("GET / HTTP/1.1", "X Y: a")),
    "an empty name": (400, head("GET / HTTP/1.1", ": a")),
    "no colon": (400, head("GET / HTTP/1.1", "abc")),
    "a name that is no token": (400, head("GET / HTTP/1.1", "X@: a")),
    "a name of high bytes": (400, head("GET / HTTP/1.1", "X\xe4: a")),
    "a bare LF": (400, b"GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n"),
    "a bare CR": (400, b"GET / HTTP/1.1\r\nHost: a\rX: b\r\n\r\n"),
    "a bare LF in the request line": (400, b"GET / HTTP/1.1\nHost: a\r\n\r\n"),
    "CR CR LF": (400, b"GET / HTTP/1.1\r\nHost: a\r\r\n\r\n"),
    "a NUL in a value": (400, head("GET / HTTP/1.1", "X: a\0b")),
    "a NUL in a name": (400, head("GET / HTTP/1.1", "X\0: ab")),
    "a control byte": (400, head("GET / HTTP/1.1", "X: a\x01b")),
    "a vertical tab": (400, head("POST / HTTP/1.1", "Transfer-Encoding: \x0bchunked")),
    "a delete byte": (400, head("GET / HTTP/1.1", "X: a\x7fb")),
    "no host": (400, head(host=None)),
    "an empty host": (400, head(host="Host:")),
    "two hosts": (400, head("GET / HTTP/1.1", "Host: b")),
    "a host with a path": (400, head(host="Host: a/b")),
    "a host with a user": (400, head(host="Host: u@a")),
    "another authority": (400, head("GET http://b/ HTTP/1.1")),
    "an authority with a user": (400, head("GET http://u@a/ HTTP/1.1")),
    "authority form": (400, head("GET a:80 HTTP/1.1")),
    "connect": (501, head("CONNECT a:80 HTTP/1.1")),
    "another scheme": (400, head("GET ftp://a/ HTTP/1.1")),
    "a star": (400, head("GET * HTTP/1.1")),
    "a fragment": (400, head("GET /#a HTTP/1.1")),
    "a quote in the path": (400, head('GET /" HTTP/1.1')),
    "a backslash": (400, head("GET /a\\b HTTP/1.1")),
    "half an escape": (400, head("GET /%2 HTTP/1.1")),
    "high bytes in the path": (400, head("GET /\xe4 HTTP/1.1")),
    "two spaces": (400, head("GET  / HTTP/1.1")),
    "a tab for a space": (400, head("GET\t/ HTTP/1.1")),
    "a trailing space": (400, head("GET / HTTP/1.1 ")),
    "HTTP/0.9": (400, b"GET /\r\n\r\n"),
    "lower-case http": (400, head("GET / http/1.1")),
    "HTTP/2": (505, b"PRI * HTTP/2.0\r\n\r\n"),
    "HTTP/1.2": (505, head("GET / HTTP/1.2")),
    "HTTP/3.1": (505, head("GET / HTTP/3.1")),
    "an unknown method": (501, head("BREW / HTTP/1.1")),
    "a lower-case method": (501, head("get / HTTP/1.1")),
    "a method that is no token": (400, head("G(T / HTTP/1.1")),
    "a long target": (414, head("GET /" + "a" * 9000 + " HTTP/1.1")),
    "many fields": (431, head("GET / HTTP/1.1", *(f"X{i}: 1" for i in range(100)))),
    "another expectation": (417, head("POST / HTTP/1.1", "Content-Length: 1", "Expect: 200-ok")),
    "an expectation without a length": (411, head("POST / HTTP/1.1", "Expect: 100-continue")),
    "an encoding without a length": (411, head("POST / HTTP/1.1", "Content-Encoding: gzip")),
    "another encoding": (415, head("POST / HTTP/1.1", "Content-Length: 1", "Content-Encoding: br")),
    "two encodings": (415, head("POST / HTTP/1.1", "Content-Length: 1", "Content-Encoding: gzip, gzip")),
    "two content types": (400, head("POST / HTTP/1.1", "Content-Type: a/b", "Content-Type: a/c")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    status, raw = REFUSED[name]
    with pytest.raises(HttpError) as caught:
        parse_head(raw, LIMITS)
    assert caught.value.status == status, caught.value.message


def test_the_message_names_the_line():
    with pytest.raises(HttpError, match="line 2 is folded"):
        parse_head(head("GET / HTTP/1.1", " b"), LIMITS)
    with pytest.raises(HttpError, match="line 3 is not 'name: value'"):
        parse_head(head("GET / HTTP/1.1", "A: b", "C"), LIMITS)


def test_half_a_head_is_refused_as_soon_as_it_is_wrong():
    whole = head("GET / HTTP/1.1", "X: y")
    for end in range(len(whole)):
        check_partial(whole[:end])
    for wrong in (b"\n", b"GET / HTTP/1.1\n", b"GET / HTTP/1.1\r\nA: b\rc", b"\x16\x03\x01\x02\x00", b"a\0"):
        with pytest.raises(HttpError):
            check_partial(wrong)


class Seen:
    def __init__(self) -> None:
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.complete = False

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.complete = True


WHOLE = head("POST /v2/models/m/infer?a=b HTTP/1.1", "Content-Length: 10", "X-Y: z", "Accept: */*")
EDITS = st.lists(
    st.tuples(
        st.integers(0, len(WHOLE) - 1),
        st.sampled_from([b"", b"\r", b"\n", b" ", b"\t", b"\0", b":", b"\r\n", b"\r\n ", b"0", b"\xff", b"/", b","]),
        st.booleans(),
    ),
    max_size=4,
)


@settings(deadline=None)
@given(EDITS)
def test_what_is_accepted_llhttp_reads_alike(edits):
    raw = bytearray(WHOLE)
    for place, piece, replaces in edits:
        raw[place : place + replaces] = piece
    raw = bytes(raw)
    stop = raw.find(b"\r\n\r\n")
    if stop < 0:
        return
    raw = raw[: stop + 4]
    try:
        read = parse_head(raw, LIMITS)
    except HttpError:
        return
    seen = Seen()
    parser = httptools.HttpRequestParser(seen)
    parser.feed_data(raw)
    assert seen.complete
    assert parser.get_method().decode() == read.method
    assert seen.url.decode() == read.path + ("?" if b"?" in seen.url else "") + read.query
    assert parser.should_keep_alive() == read.keep_alive
    assert [name for name, _ in seen.headers] == list(read.headers)
    assert {name: value.rstrip(b"\t ") for name, value in seen.headers} == read.headers

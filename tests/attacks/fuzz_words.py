"""The fuzzer's dictionary: pieces that mean something to the reader of a request, and bodies that say odd things."""

from __future__ import annotations

import base64
import json
import random
from typing import Any

PIECES = [
    *(b"", b"\r", b"\n", b"\r\n", b"\r\n\r\n", b"\n\n", b"\0", b" ", b"\t", b":", b";", b",", b"0", b"9" * 20, b"\xff"),
    *(b"chunked", b"Content-Length: 5\r\n", b"Content-Length: 99999999999\r\n", b"Transfer-Encoding: chunked\r\n"),
    *(b"HTTP/1.1", b"HTTP/1.0", b"HTTP/9.9", b"Connection: close\r\n", b"Expect: 100-continue\r\n", b"%00", b"%", b"?"),
    *(
        b"Inference-Header-Content-Length: 3\r\n",
        b"Content-Encoding: gzip\r\n",
        b"Host: x\r\n",
        b"..",
        b"//",
        b"[" * 40,
    ),
    *(b'"shape"', b'"parameters"', b"null", b"NaN", b"1e999", b"-1", b"{}", b"[]", b'"\\ud800"', b"\xed\xa0\x80"),
]

OTHER_REQUESTS = [
    f"{method} {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode()
    for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")
    for path in (
        *("/", "/v2", "/v2/", "/v2/health/live", "/v2/health/ready", "/v2/models/tag", "/v2/models/tag/config"),
        *("/v2/models/tag/stats", "/v2/models/stats", "/v2/models/none", "/v2/models/%74ag/ready", "/v2/../v2"),
        *("/v2/models/tag/versions/1/infer", "/v2/models/tag/versions/9/infer", "/v2/repository/index", "//", "/%00"),
        *("/v2/models/" + "n" * 2000, "/v2/models/%ff%fe/infer", "/v2/models/tag/infer?x=1", "/v2/models//versions//"),
    )
]


def _doubtful(*fields: str, line: str = "POST /v2/models/tag/infer HTTP/1.1", host: str = "Host: test") -> bytes:
    lines = (line, *((host,) if host else ()), *fields, "", "@INNER@")
    return "\r\n".join(lines).encode("latin-1")


_LENGTH = "Content-Length: @LENGTH@"
_CHUNKED = "Transfer-Encoding: chunked"
DOUBTFUL_HEADS = [
    _doubtful(_LENGTH, "Content-Length: 0"),
    _doubtful("Content-Length: 0", _LENGTH),
    _doubtful(_LENGTH, _LENGTH),
    _doubtful("Content-Length: @LENGTH@, 0"),
    _doubtful("Content-Length: @LENGTH@, @LENGTH@"),
    *(
        _doubtful(f"Content-Length: {text}")
        for text in ("", "+@LENGTH@", "-1", "0x40", "1_0", "1e2", "1.0", "\xb2", "9" * 30)
    ),
    _doubtful(_LENGTH, _CHUNKED),
    _doubtful(_CHUNKED, _LENGTH),
    _doubtful(_CHUNKED, _CHUNKED),
    *(
        _doubtful(f"Transfer-Encoding: {text}")
        for text in (
            "identity",
            "gzip",
            "chunked, identity",
            "identity, chunked",
            "chunked, chunked",
            "xchunked",
            "\x0bchunked",
            '"chunked"',
        )
    ),
    _doubtful(_CHUNKED, line="POST /v2/models/tag/infer HTTP/1.0"),
    _doubtful("Content-Length : @LENGTH@"),
    _doubtful("Content-Length\t: @LENGTH@"),
    _doubtful("Transfer-Encoding : chunked"),
    _doubtful("X: y", " folded", _LENGTH),
    _doubtful("X: y\r\n\tContent-Length: @LENGTH@"),
    _doubtful(" Content-Length: @LENGTH@"),
    _doubtful("X: y\nContent-Length: @LENGTH@"),
    _doubtful("X: y\rContent-Length: @LENGTH@"),
    _doubtful("X: y\0", _LENGTH),
    _doubtful("no colon here", _LENGTH),
    _doubtful(": nameless", _LENGTH),
    _doubtful(_LENGTH, "Host: other"),
    _doubtful(_LENGTH, host=""),
    _doubtful(_LENGTH, host="Host: a b"),
    _doubtful(_LENGTH, host="Host: a/b"),
    _doubtful(_LENGTH, line="POST http://elsewhere/v2/models/tag/infer HTTP/1.1"),
    _doubtful(_LENGTH, line="post /v2/models/tag/infer HTTP/1.1"),
    _doubtful(_LENGTH, line="POST /v2/models/tag/infer HTTP/2.0"),
    _doubtful(_LENGTH, line="POST /v2/models/tag/infer HTTP/1.1 "),
    _doubtful(_LENGTH, line="POST  /v2/models/tag/infer HTTP/1.1"),
    _doubtful(_LENGTH, line="POST\t/v2/models/tag/infer HTTP/1.1"),
    _doubtful(_LENGTH, line="POST /v2/models/tag infer HTTP/1.1"),
    _doubtful(_LENGTH, line="POST /v2/models/%zz/infer HTTP/1.1"),
    _doubtful(_LENGTH, line="POST v2/models/tag/infer HTTP/1.1"),
    _doubtful(_LENGTH, line="POST * HTTP/1.1"),
    _doubtful(_LENGTH, line="POST /v2/models/tag/infer"),
    _doubtful(_LENGTH, line=" POST /v2/models/tag/infer HTTP/1.1"),
    _doubtful(_LENGTH, "Inference-Header-Content-Length: 1", "Inference-Header-Content-Length: 2"),
    _doubtful(_LENGTH, "Content-Encoding: identity", "Content-Encoding: gzip"),
]
"""One refusal, and the connection is closed: what follows cannot be trusted. ``@INNER@`` is a whole request."""

DOUBTFUL_CHUNKS = [
    _doubtful(_CHUNKED).replace(b"@INNER@", chunks + b"@INNER@")
    for chunks in (
        *(
            b"0x5\r\nhello\r\n0\r\n\r\n",
            b"-5\r\nhello\r\n0\r\n\r\n",
            b"+5\r\nhello\r\n0\r\n\r\n",
            b" 5\r\nhello\r\n0\r\n\r\n",
        ),
        *(b"5\nhello\r\n0\r\n\r\n", b"5\r\nhello!\r\n0\r\n\r\n", b"5\r\nhello0\r\n\r\n", b"5\r\nhello\n0\r\n\r\n"),
        *(
            b"FFFFFFFFFFFFFFFFF\r\n",
            b"FFFFFFFFFFFF\r\n",
            b"\r\n",
            b"g\r\n",
            b"5;\0\r\nhello\r\n0\r\n\r\n",
            b"5;" + b"x" * 200 + b"\r\n",
        ),
        *(
            b"0\r\nContent-Length : 5\r\n\r\n",
            b"0\r\nX: y\n\r\n",
            b"0\r\n folded\r\n\r\n",
            b"0\n\n",
            b"5_0\r\n",
            b"5\r\r\n",
        ),
    )
]

_NAMES = ["x", "y", "x_out", "count", "half", "flag", "pixel", "brain", "", "\0", "n" * 3000, "\u202e", 7, None, [], {}]
_DATATYPES = [
    *("FP32", "FP16", "BF16", "FP64", "INT64", "INT8", "UINT8", "UINT64", "BOOL", "BYTES", "fp32", "", "FP32 "),
    *(None, 1, ["FP32"]),
]
_DIMENSIONS = [0, 1, 2, 3, 4, 8, 9, 16, 17, -1, 2**31, 2**63 - 1, 2**63, 2**64, 1.5, 1.0, "1", None, True, [1]]
_SIZES = [0, 1, 15, 16, 32, 128, 1000, -1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 1.5, "16", None, True, []]
_NUMBERS = [0, 1, -1, 0.5, 1e38, 1e39, -1e308, 10**400, 2**63, True, "1", None, [], {}, [[1]]]
_TEXTS = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"{}",
    b'""',
    b"\xff\xfe",
    b"\xef\xbb\xbf{}",
    b"[" * 5000,
    b'{"a":' * 2000,
    b"{}{}",
]


def damaged_json(chance: random.Random) -> bytes:
    """The JSON of a request in which something is odd."""
    if chance.random() < 0.05:
        return chance.choice(_TEXTS)
    request = _odd_request(chance)
    for _ in range(chance.choice([0, 0, 0, 1, 2])):
        _spoil(chance, request)
    text = json.dumps(request, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
    if chance.random() < 0.15:
        place = chance.randrange(len(text))
        text = text[:place] + chance.choice(PIECES) + text[place + chance.randint(0, 3) :]
    return text


def _odd_request(chance: random.Random) -> dict[str, Any]:
    found: dict[str, Any] = {"inputs": [_odd_input(chance) for _ in range(chance.choice([0, 1, 1, 1, 1, 2, 5]))]}
    if chance.random() < 0.3:
        found["id"] = chance.choice(["", "1", "i" * 513, "\u0000\u2028", "\ud800", 5, None, []])
    if chance.random() < 0.5:
        found["outputs"] = [_odd_output(chance) for _ in range(chance.choice([0, 1, 1, 2]))]
    if chance.random() < 0.5:
        found["parameters"] = {
            "priority": chance.choice([chance.randrange(2**63), *_SIZES]),
            "timeout": chance.choice([1, 50, 10**6, 10**6, *_SIZES]),
            "binary_data_output": chance.choice([True, False, True, "yes", None]),
            "sequence_id": chance.choice([0, "", 0, "", 5, "s", None]),
            chance.choice(["unknown", "priority2", "\0"]): chance.choice(_NUMBERS),
        }
    return found


def _odd_input(chance: random.Random) -> dict[str, Any]:
    rows = chance.choice([1, 1, 2, 8])
    odd = chance.random
    found: dict[str, Any] = {
        "name": "x" if odd() < 0.7 else chance.choice(_NAMES),
        "datatype": "FP32" if odd() < 0.7 else chance.choice(_DATATYPES),
        "shape": [rows, 4]
        if odd() < 0.6
        else [chance.choice(_DIMENSIONS) for _ in range(chance.choice([0, 1, 2, 2, 3, 70]))],
    }
    if odd() < 0.6:
        found["data"] = (
            [0.5] * (rows * 4) if odd() < 0.5 else [chance.choice(_NUMBERS) for _ in range(chance.randint(0, 9))]
        )
    if odd() < 0.5:
        found["parameters"] = _odd_place(chance)
    return found


def _odd_place(chance: random.Random) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if chance.random() < 0.6:
        found["binary_data_size"] = chance.choice(_SIZES)
    if chance.random() < 0.3:
        found["shared_memory_region"] = chance.choice(["r", "", "../etc", "\0", 5, None])
        found["shared_memory_byte_size"] = chance.choice(_SIZES)
        found["shared_memory_offset"] = chance.choice(_SIZES)
    return found


def _odd_output(chance: random.Random) -> dict[str, Any]:
    found: dict[str, Any] = {"name": "x_out" if chance.random() < 0.7 else chance.choice(_NAMES)}
    if chance.random() < 0.6:
        found["parameters"] = {
            "binary_data": chance.choice([True, False, None, 1]),
            "classification": chance.choice([0, 1, 3, 100, *_SIZES]),
            **_odd_place(chance),
        }
    return found


def _spoil(chance: random.Random, value: Any) -> None:
    """Change something somewhere inside of lists and dicts."""
    while isinstance(value, dict | list) and value:
        key = chance.choice(list(value)) if isinstance(value, dict) else chance.randrange(len(value))
        if chance.random() < 0.4 or not (isinstance(value[key], dict | list) and value[key]):
            if chance.random() < 0.3:
                del value[key]
            else:
                noise = base64.b64encode(chance.randbytes(6)).decode()
                value[key] = chance.choice([None, 0, -1, 1e300, True, [], {}, noise, [[[]]], "x" * 5000])
            return
        value = value[key]

"""Who may call what, with which token, and which files a token may stand in."""

from __future__ import annotations

import itertools
import os

import pytest

from onecard.errors import UsageError
from onecard.server.access import Access, read_token
from onecard.server.http_types import HttpError

INFER, CONTROL, WRONG = b"i" * 16, b"c" * 40, b"w" * 16
ELSEWHERE = "192.0.2.7"


def bearer(token):
    return {b"authorization": b"Bearer " + token}


def status(access, kind, headers, peer=ELSEWHERE, trusted=False):
    """What the check answers; 200 when it lets the request pass."""
    try:
        access.check(kind, headers, peer, trusted)
    except HttpError as error:
        return error.status
    return 200


# (inference token, control token) to the status of (infer, control) from elsewhere and (infer, control) from here,
# without a token, and then with the inference token, the control token, and a wrong one.
TABLE = {
    (None, None): {"none": (200, 403, 200, 200), "wrong": (200, 403, 200, 200)},
    (INFER, None): {
        "none": (401, 403, 401, 401),
        "infer": (200, 403, 200, 200),
        "control": (401, 403, 401, 401),
        "wrong": (401, 403, 401, 401),
    },
    (None, CONTROL): {
        "none": (200, 401, 200, 401),
        "infer": (200, 401, 200, 401),
        "control": (200, 200, 200, 200),
        "wrong": (200, 401, 200, 401),
    },
    (INFER, CONTROL): {
        "none": (401, 401, 401, 401),
        "infer": (200, 401, 200, 401),
        "control": (200, 200, 200, 200),
        "wrong": (401, 401, 401, 401),
    },
}
SENT = {"none": {}, "infer": bearer(INFER), "control": bearer(CONTROL), "wrong": bearer(WRONG)}


@pytest.mark.parametrize(("tokens", "sent"), [(tokens, sent) for tokens, row in TABLE.items() for sent in row])
def test_every_right(tokens, sent):
    access, headers = Access(*tokens), SENT[sent]
    got = tuple(
        status(access, kind, headers, peer)
        for peer, kind in itertools.product((ELSEWHERE, "127.0.0.1"), ("infer", "control"))
    )
    assert got == TABLE[tokens][sent]
    assert status(access, "health", headers) == 200


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.255.0.3", "::1", "::ffff:127.0.0.1"])
def test_loopback_is_here(peer):
    assert status(Access(None, None), "control", {}, peer) == 200


@pytest.mark.parametrize(
    "peer",
    ["10.0.0.1", "0.0.0.0", "::", "::ffff:10.0.0.1", "fe80::1%eth0", "localhost", "unix", "", "127.0.0.1, 1.2.3.4"],
)
def test_every_other_name_is_elsewhere(peer):
    assert status(Access(None, None), "control", {}, peer) == 403


def test_a_unix_socket_is_here_because_its_listener_says_so():
    assert status(Access(None, None), "control", {}, "unix", trusted=True) == 200


def test_a_listener_that_is_trusted_does_not_do_without_a_token():
    assert status(Access(None, CONTROL), "control", {}, "unix", trusted=True) == 401
    assert status(Access(INFER, None), "infer", {}, "unix", trusted=True) == 401


@pytest.mark.parametrize("name", [b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via", b"origin"])
@pytest.mark.parametrize(("peer", "trusted"), [("127.0.0.1", False), ("unix", True)])
def test_what_a_proxy_or_a_browser_passes_on_is_from_elsewhere(name, peer, trusted):
    assert status(Access(None, None), "control", {name: b"x"}, peer, trusted) == 403
    assert status(Access(None, CONTROL), "control", {name: b"x", **bearer(CONTROL)}, peer, trusted) == 200


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"Bearer",
        b"Bearer ",
        INFER,
        b"Basic " + INFER,
        b"Bearer " + INFER[:-1],
        b"Bearer " + INFER + b"i",
        b"Bearer " + INFER.upper(),
        b"Bearer " + INFER + b", Bearer " + INFER,  # the field came twice
        b"Bearer\t" + INFER,
        b"Bearer \xff\xfe",
    ],
)
def test_what_is_not_the_token(value):
    with pytest.raises(HttpError) as refused:
        Access(INFER, None).check("infer", {b"authorization": value}, ELSEWHERE, False)
    assert refused.value.status == 401
    assert list(refused.value.headers) == [(b"WWW-Authenticate", b'Bearer realm="onecard"')]
    assert INFER.decode() not in refused.value.message


@pytest.mark.parametrize("scheme", [b"Bearer ", b"bearer ", b"BEARER   "])
def test_the_scheme_in_any_case(scheme):
    assert status(Access(INFER, None), "infer", {b"authorization": scheme + INFER}) == 200


def test_an_access_does_not_show_its_tokens():
    access = Access(INFER, CONTROL)
    kept = repr([getattr(access, name) for name in Access.__slots__]) + repr(access)
    assert INFER.decode() not in kept and CONTROL.decode() not in kept


def written(folder, data, mode=0o600):
    path = folder / "token"
    path.write_bytes(data)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("data", [b"0123456789abcdef", b"  0123456789abcdef\r\n", b"\n0123456789abcdef\n\n"])
def test_a_token_without_the_space_around_it(tmp_path, data):
    assert read_token(written(tmp_path, data)) == b"0123456789abcdef"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"0123456789abcde", "15 characters, expected 16"),
        (b"0123456789 abcdef", "without white space"),
        (b"0123456789abcdef\n0123456789abcdef", "without white space"),
        ("0123456789abcdéf".encode(), "ASCII"),
        (b"0123456789abcde\x00f", "ASCII"),
        (b"x" * 4097, "4096"),
        (b"x" * 100_000, "4096"),
    ],
)
def test_what_is_no_token(tmp_path, data, said):
    with pytest.raises(UsageError, match=said) as refused:
        read_token(written(tmp_path, data))
    assert "openssl" in refused.value.cure
    assert "0123456789" not in str(refused.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o601, 0o777])
def test_a_token_that_others_may_get_at(tmp_path, mode):
    path = written(tmp_path, INFER, mode)
    with pytest.raises(UsageError, match=f"{mode:04o}") as refused:
        read_token(path)
    assert f"chmod 600 {path}" in refused.value.cure


def test_a_token_that_only_its_owner_may_read(tmp_path):
    assert read_token(written(tmp_path, INFER, 0o400)) == INFER


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe", 0o600)  # nobody writes into it: reading would wait for ever
    for path, said in [(tmp_path, "Is a directory"), (tmp_path / "pipe", "regular file"), (tmp_path / "no", "No such")]:
        with pytest.raises(UsageError, match=said):
            read_token(path)

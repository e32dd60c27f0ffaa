"""A server that is sent twelve thousand requests, most of them damaged, over many connections at once."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator

import pytest

from tests.attacks.attacked import attacked
from tests.attacks.fuzz_cases import make_case
from tests.attacks.fuzz_http import Fuzzer, Held, fuzz, grew
from tests.attacks.loops import run
from tests.attacks.null_server import MIXED, NullBundle

pytestmark = pytest.mark.timeout(400)


def test_a_fuzzed_server_stays_what_it_was(tmp_path):
    with attacked({"tag": NullBundle(), "mixed": NullBundle(MIXED)}, "--quick") as server:
        fuzzer = Fuzzer(server.port, 3, tmp_path, patience=5)
        before, after = fuzz(server, fuzzer, requests=12_000, warm_up=3_000)
        found = fuzzer.findings
        assert not found.faults, "\n".join(found.faults)
        assert found.requests >= 12_000
        assert found.again < found.connections / 4
        assert found.good >= 11
        assert found.statuses[200] > 3_000 and found.statuses[400] > 1_800
        assert set(found.kinds) == {
            *("bytes", "json", "doubtful", "unusual", "compressed", "pipelined", "slow", "half", "left"),
        }
        assert not grew(before, after), (before, after)
        assert server.end() == 0
        assert "Traceback" not in server.output


def test_a_case_is_made_of_its_seed_and_number_alone():
    assert [make_case(1, n) for n in range(300)] == [make_case(1, n) for n in range(300)]
    assert make_case(1, 5) != make_case(2, 5)


def test_growth_is_seen():
    assert not grew(Held(100 << 20, 20), Held(110 << 20, 20))
    assert grew(Held(100 << 20, 20), Held(100 << 20, 21))
    assert grew(Held(100 << 20, 20), Held(130 << 20, 20))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n", "500"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", ""),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", "closed within an answer"),
        (b"hello", "expected an answer"),
        (b"", "answers were expected"),
    ],
)
def test_a_bad_server_is_found_out(tmp_path, answer, words):
    with answering(answer) as port:
        fuzzer = Fuzzer(port, 1, tmp_path, at_once=4)
        run(fuzzer.run(200))
    assert any(words in fault for fault in fuzzer.findings.faults)
    assert list(tmp_path.glob("case-1-*.bin"))


@contextlib.contextmanager
def answering(answer: bytes) -> Iterator[int]:
    """A server that says the same to all that comes, and closes."""

    class Talk(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.settimeout(60)
            with contextlib.suppress(OSError):
                self.request.recv(65536)
                self.request.sendall(answer)
                self.request.shutdown(socket.SHUT_WR)
                while self.request.recv(65536):
                    pass

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Talk) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()

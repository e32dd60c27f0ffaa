"""Many clients at once, some of which go away: each sees its own answers only."""

from __future__ import annotations

import pytest

from tests.attacks.attacked import attacked
from tests.attacks.null_server import NullBundle
from tests.attacks.tagged import Share, send
from tests.attacks.wire import Answer, fault_of, infer, infer_in_json, json_body, pack_body

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize(("delay_ms", "requests"), [(0.0, 16_000), (2.0, 4_000)])
def test_no_client_sees_anothers_answer(delay_ms, requests):
    with attacked({"tag": NullBundle(delay_ms=delay_ms)}) as server:
        descriptors = server.descriptors()
        counts = send(Share(server.port, 1_000_000, requests, cancelled=0.05, seed=round(delay_ms)))
        assert (counts.wrong, counts.lost, dict(counts.refused)) == (0, 0, {}), counts
        assert 0.03 < counts.cancelled / requests < 0.07
        assert counts.right == requests - counts.cancelled
        assert server.descriptors() <= descriptors + 64
        assert server.end() == 0
        assert "Traceback" not in server.output


def test_another_tag_is_seen():
    body = infer(5).partition(b"\r\n\r\n")[2].replace(b": ", b":")
    binary = {b"inference-header-content-length": b"%d" % (len(body) - 16)}
    right = body[:-16] + pack_body(5, 1)[-16:]
    assert "another id" in fault_of(Answer(200, binary, right), 6, 1)
    assert "should be" in fault_of(Answer(200, binary, right), 5, 1)
    assert infer_in_json(5).endswith(json_body(5, 1))
    text = b'{"id":"0000000005","outputs":[{"data":[22.0,7.0,22.0,22.0]}]}'
    assert fault_of(Answer(200, {}, text), 5, 1) == ""
    assert "should be" in fault_of(Answer(200, {}, text.replace(b"22.0,7.0", b"22.0,8.0")), 5, 1)

"""Many clients at once, some of which go away: each sees its own answers only."""

from __future__ import annotations

import pytest

from tests.attacks.attacked import attacked, settled
from tests.attacks.null_server import NullBundle
from tests.attacks.tagged import Counts, Share, harming, send
from tests.attacks.wire import Answer, fault_of, infer, infer_in_json, json_body, pack_body

pytestmark = pytest.mark.timeout(400)


def test_no_client_sees_anothers_answer():
    with attacked({"tag": NullBundle()}) as server:
        descriptors = server.descriptors()
        check(send(Share(server.port, 1_000_000, 12_000, cancelled=0.05, seed=0)), 12_000)
        most = descriptors + 64
        assert settled(server.descriptors, lambda count: count <= most, 60) <= most
        assert server.end() == 0
        assert "Traceback" not in server.output


def test_nor_while_the_engine_is_killed_and_the_model_is_loaded_again():
    with attacked({"tag": NullBundle(delay_ms=1.0)}) as server:
        with harming(server, kill_every_s=1.5, reload_every_s=0.4, kills=3) as done:
            counts = send(Share(server.port, 2_000_000, 6_000, cancelled=0.05, seed=2))
        check(counts, 6_000)
        assert done["kill_engine: SIGKILL"] >= 1 and done["reload_model: status 200"] >= 1, done
        assert server.end() == 0
        assert "Traceback" not in server.output


def check(counts: Counts, requests: int) -> None:
    """All were answered rightly but those that were given up."""
    assert (counts.wrong, counts.lost, dict(counts.refused)) == (0, 0, {}), counts
    assert 0.03 < counts.cancelled / requests < 0.07
    assert counts.right == requests - counts.cancelled


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

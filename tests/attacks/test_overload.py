"""Four times more than the server can do, for a few seconds."""

from __future__ import annotations

import pytest

from tests.attacks.attacked import attacked
from tests.attacks.open_load import Sample, outcomes, percentile
from tests.attacks.overload import Setting, overload
from tests.attacks.wire import Answer, infer

pytestmark = pytest.mark.timeout(400)
COLLAPSED = 0.5
"""How much goodput is kept to the per cent is for the script to show, on a quiet machine."""
TRIES = 3
"""A machine that is busy with other things takes the server's time too; a server that collapses does so each time."""


def test_goodput_stays_and_refusals_are_honest():
    # So little a second, and so long deadlines, that also a machine of a fifth of the speed has time left.
    setting = Setting(seconds=5, peak_seconds=2, delay_ms=120, deadline_ms=1000, way_ms=500, settle_s=60)
    kept = []
    with attacked({"tag": setting.bundle}) as server:
        while len(kept) < TRIES and max(kept, default=0.0) < COLLAPSED:
            found = overload(server, setting)
            assert server.process.poll() is None
            assert not found.over.faults, found.over
            assert found.over.counts.get("refused 504", 0) > 0, found.over
            before, after = found.resident_mib
            assert after < before + 16, found
            kept.append(found.kept)
    assert max(kept) >= COLLAPSED, kept


def test_the_attacker_knows_a_wrong_answer_from_a_right_one():
    wire = infer(7)
    body = wire.partition(b"\r\n\r\n")[2].replace(b": ", b":")
    length = {b"inference-header-content-length": b"%d" % (len(body) - 16)}
    echoed = Sample(7, 0.0)
    echoed.take(Answer(200, length, body))  # the input, not the function of it
    refused = Sample(7, 0.0)
    refused.take(Answer(429, {b"retry-after": b"1"}, b""))
    assert (echoed.outcome, refused.outcome, refused.retry_after) == ("wrong", "refused", True)
    assert outcomes([echoed, refused, refused]) == {"refused 429": 2, "wrong": 1}


def test_percentiles():
    assert percentile([], 0.99) == 0
    assert percentile([float(n) for n in range(100)], 0.99) == 99
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2

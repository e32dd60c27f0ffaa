"""What tuning found, as a file: it comes back as it was, and nothing else is taken for it."""

from __future__ import annotations

import json

import pytest
from msgspec.structs import replace

from onecard.environment import Environment
from onecard.errors import BundleError
from onecard.tuning import (
    MAX_TUNING_BYTES,
    TUNING_FORMAT,
    LoadPoint,
    Setting,
    Tuning,
    tuning_from_bytes,
    tuning_to_bytes,
)

ENVIRONMENT = Environment("cpu", None, "a processor", (), 2, 2, 1 << 30, {"torch": "2.11"})
POINTS = (
    LoadPoint(1, 1, 1000.0, 1.0, 1.2, 500),
    LoadPoint(8, 1, 4000.0, 2.0, 2.4, 250),
    LoadPoint(16, 1, failed="out of memory"),
)
SETTINGS = (
    Setting(1.0, failed="no batch is that quick"),
    Setting(5.0, 8, 0.5, 1, 3000.0, 2.0, 4.8, 3000, 6.5),
    Setting(20.0, 8, 2.0, 1, 3800.0, 4.0, 15.0, 3800, 7.5),
    Setting(50.0, 8, 2.0, 1, 3900.0, 4.0, 55.0, 3800, 7.5, "its confirming run had a p99 of 55 ms"),
)
FOUND = Tuning("cpu", ENVIRONMENT, POINTS, POINTS[1], SETTINGS, 1, {"S": 128}, "onecard tune", "2026", 3.5, ("a note",))


def test_it_comes_back_as_it_was():
    assert tuning_from_bytes(tuning_to_bytes(FOUND)) == FOUND


@pytest.mark.parametrize(
    ("limit_ms", "found"), [(4.9, None), (5.0, 5.0), (19.0, 5.0), (20.0, 20.0), (100.0, 20.0), (0.5, None)]
)
def test_a_limit_gets_the_loosest_setting_that_keeps_it(limit_ms, found):
    setting = FOUND.setting(limit_ms)
    assert (setting.p99_limit_ms if setting else None) == found


def test_service_time_is_the_time_between_batches_of_a_lane():
    assert POINTS[1].service_ms == 2.0
    assert LoadPoint(8, 2, 4000.0).service_ms == 4.0
    assert POINTS[2].service_ms == 0.0


def changed(**changes):
    return json.dumps(json.loads(tuning_to_bytes(FOUND)) | changes).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "does not follow the format"),
        (b"[]", "does not follow the format"),
        (b"\xff\xfe{", "does not follow the format"),
        (b"[" * 100_000, "does not follow the format"),
        (tuning_to_bytes(FOUND)[:-40], "does not follow the format"),
        (b" " * (MAX_TUNING_BYTES + 1), "4 MiB"),
        (changed(format=TUNING_FORMAT + 1), "format 2"),
        (changed(seconds=-1.0), "does not follow the format"),
        (changed(points=[{"batch": 0, "lanes": 1}]), "does not follow the format"),
        (changed(points=[{"batch": 1, "lanes": 1, "rows_per_s": 1e300}]), "does not follow the format"),
        (changed(notes=["x"] * 1001), "does not follow the format"),
        (changed(knee="8"), "does not follow the format"),
    ],
)
def test_what_is_no_tuning_is_refused(data, message):
    with pytest.raises(BundleError, match=message):
        tuning_from_bytes(data, "tuning.json")


def test_fields_of_a_later_writer_are_ignored():
    assert tuning_from_bytes(changed(colour="blue")) == FOUND


def test_there_may_be_no_knee():
    nothing = replace(FOUND, points=(), knee=None, settings=())
    assert tuning_from_bytes(tuning_to_bytes(nothing)) == nothing

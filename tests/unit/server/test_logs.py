"""One record a line, whatever clients send; ids of requests; and how many of them are logged."""

from __future__ import annotations

import io
import itertools
import json
import logging
import re
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from onecard.errors import UsageError
from onecard.server.logs import AccessLog, Entry, RequestIds, setup_logs
from tests.services.running_server import GOLDEN, serving

EVIL = "a\nb\r\x1b[31mc\x00\x7f\x9b1m\u2028\u2029\u202e\u2066\ud800\u0085z"
ENTRY = Entry("POST", "/v2/models/m/infer", 200, 12, 34, 1.23456, "192.0.2.7", "m", "id-1")
LOGGER = logging.getLogger("onecard.server")


@pytest.fixture
def tree():
    """The loggers of onecard, put back as they were, and so the root's handlers."""
    tree, root = logging.getLogger("onecard"), logging.getLogger()
    before = (list(tree.handlers), tree.level, tree.propagate)
    yield tree
    tree.handlers[:], level, tree.propagate = before
    tree.setLevel(level)
    for handler in [each for each in root.handlers if each.name == "onecard.server.logs"]:  # pytest's own come and go
        root.removeHandler(handler)
    logging.captureWarnings(False)


@pytest.fixture
def written(tree):
    """Sets up logs; what is written can be read from what it returns."""

    def setup(form, level="info"):
        stream = io.StringIO()
        setup_logs(form, level, stream)
        return stream

    return setup


def failure(text):
    try:
        raise ValueError(text)
    except ValueError as error:
        return error


def test_json_has_a_record_a_line(written):
    stream = written("json")
    LOGGER.info("it %s", "works", extra={"request_id": "r", "ms": 1.5, "status": 200, "none": None, "is": True})
    LOGGER.warning("second")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("time"))
    assert first == {
        "level": "info", "logger": "onecard.server", "message": "it works",
        "request_id": "r", "ms": 1.5, "status": 200, "none": None, "is": True,
    }  # fmt: skip
    assert (second["level"], second["message"]) == ("warning", "second")


@pytest.mark.parametrize(
    ("created", "said"),
    [(0.0, "1970-01-01T00:00:00.000Z"), (1.9999, "1970-01-01T00:00:01.999Z"), (1e9, "2001-09-09T01:46:40.000Z")],
)
@pytest.mark.parametrize("form", ["human", "json"])
def test_times_are_utc_and_never_rounded_up(written, form, created, said):
    stream = written(form)
    record = logging.makeLogRecord({"name": "onecard.server", "levelno": 20, "levelname": "INFO", "created": created})
    LOGGER.handle(record)
    assert said in stream.getvalue()


def test_a_human_reads_names_and_values(written):
    stream = written("human")
    LOGGER.info("asked", extra={"model": "m", "ms": 1.5, "reason": 'two "words"', "empty": "", "none": None})
    assert stream.getvalue()[25:] == ('INFO    onecard.server asked model=m ms=1.5 reason="two \\"words\\"" empty=""\n')


@pytest.mark.parametrize("form", ["human", "json"])
def test_nobody_writes_lines_of_their_own(written, form):
    stream = written(form)
    LOGGER.info("said %s", EVIL, extra={"path": EVIL, EVIL: 1})
    AccessLog(1).write(Entry("GET", "/" + EVIL, 404, 0, 0, 0.0, EVIL, EVIL, EVIL))
    text = stream.getvalue()
    assert len(text.splitlines()) == text.count("\n") == 2
    assert all(" " <= character <= "~" for character in text.replace("\n", ""))
    if form == "json":
        first, second = map(json.loads, text.splitlines())
        assert (first["message"], first["path"], second["client"]) == (f"said {EVIL}", EVIL, EVIL)


@pytest.mark.parametrize("evil", ["\x1b[31mred", "a\x7f", "a\x9b1m", "a\u202eb", "\ud800"])
def test_a_value_of_one_word_cannot_steer_a_terminal(written, evil):
    stream = written("human")
    LOGGER.info("asked", extra={"path": evil})
    assert stream.getvalue().endswith(f"path={json.dumps(evil)}\n")
    assert stream.getvalue().strip().isprintable()


def test_a_value_cannot_pass_for_another_field(written):
    stream = written("human")
    LOGGER.info("asked", extra={"path": "/x status=200", "client": 'y" status="200'})
    assert stream.getvalue().endswith(r'path="/x status=200" client="y\" status=\"200"' + "\n")


def test_a_traceback_follows_indented(written):
    stream = written("human")
    LOGGER.error("failed", exc_info=failure(f"no\n2001-09-09T01:46:40.000Z INFO    onecard.server {EVIL}"))
    first, *rest = stream.getvalue().splitlines()
    assert first.endswith("ERROR   onecard.server failed")
    assert rest[0] == "    Traceback (most recent call last):" and "ValueError: no" in stream.getvalue()
    assert all(line.startswith("    ") for line in rest)
    assert "\x1b" not in stream.getvalue()


def test_a_traceback_is_a_field_of_json(written):
    stream = written("json")
    LOGGER.error("failed", exc_info=failure("no such luck"), stack_info=True)
    (line,) = stream.getvalue().splitlines()
    found = json.loads(line)["exception"]
    assert "ValueError: no such luck" in found and "Stack (most recent call last)" in found


def test_json_says_what_is_no_json_in_words(written):
    stream = written("json")
    LOGGER.info("odd", extra={"nan": float("nan"), "bytes": b"a\xff", "object": {"a": {1}}, "level": "mine"})
    found = json.loads(stream.getvalue(), parse_constant=pytest.fail)
    assert (found["nan"], found["bytes"], found["object"]) == ("nan", "a\\xff", "{'a': {1}}")
    assert found["level"] == "info"


def test_others_are_left_as_they_are_but_for_their_warnings(tree):
    root = logging.getLogger()
    before = (set(root.handlers), root.level)
    first, second = io.StringIO(), io.StringIO()
    setup_logs("human", "info", first)
    others = logging.NullHandler()
    tree.addHandler(others)
    handler = setup_logs("json", "info", second)
    assert (set(root.handlers), root.level) == (before[0] | {handler}, before[1])
    assert others in tree.handlers and not tree.propagate
    LOGGER.info("once")
    logging.getLogger("elsewhere").info("too little")
    logging.getLogger("elsewhere").error("of two\nlines")
    assert first.getvalue() == ""
    found = [json.loads(line) for line in second.getvalue().splitlines()]
    assert [(each["logger"], each["message"]) for each in found] == [
        ("onecard.server", "once"),
        ("elsewhere", "of two\nlines"),
    ]


def test_warnings_of_python_are_records_of_json():
    code = (
        "import warnings; from onecard.server.logs import setup_logs; setup_logs('json', 'error'); warnings.warn('x')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=180)
    (line,) = done.stderr.splitlines()
    assert (json.loads(line)["logger"], "UserWarning: x" in json.loads(line)["message"]) == ("py.warnings", True)


@pytest.mark.parametrize("form", ["human", "json"])
def test_a_process_says_its_name(tree, form):
    stream = io.StringIO()
    setup_logs(form, "info", stream, process="engine")
    LOGGER.info("asked", extra={"ms": 1.5})
    if form == "json":
        assert json.loads(stream.getvalue())["process"] == "engine"
    else:
        assert stream.getvalue().endswith(" asked process=engine ms=1.5\n")


@pytest.mark.parametrize(("form", "level", "lines"), [("json", "info", 1), ("human", "info", 1), ("json", "error", 0)])
def test_the_engine_s_process_logs_as_it_is_told(tmp_path, form, level, lines):
    """One that nobody connects to says so and ends."""
    code = "from onecard.server import engine_process as p; p.run_engine.__defaults__ = (None, 0.2, None); p.main()"
    words = ["--socket", str(tmp_path / "s"), "--log-format", form, "--log-level", level]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *words], capture_output=True, text=True, check=True, timeout=180
    )
    found = done.stderr.splitlines()
    assert len(found) == lines
    for line in found:
        if form == "json":
            told = json.loads(line)
            assert (told["level"], told["logger"], told["process"]) == (
                "warning",
                "onecard.server.engine_process",
                "engine",
            )
        else:
            assert line.endswith("the engine ends process=engine") and "WARNING onecard.server.engine_process" in line
        assert "no front has been connected" in line


def test_run_as_a_program_the_engine_s_process_logs_under_its_name(tmp_path):
    words = ["--socket", str(tmp_path / ("x" * 200)), "--log-format", "json"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "onecard.server.engine_process", *words],
        capture_output=True, text=True, check=False, timeout=180,
    )  # fmt: skip
    (line,) = done.stderr.splitlines()
    assert (json.loads(line)["level"], json.loads(line)["logger"]) == ("critical", "onecard.server.engine_process")
    assert done.returncode == 2


@pytest.mark.timeout(300)
def test_all_processes_of_a_server_write_an_object_a_line():
    """Notices, the engine's records, and requests of both ways in."""
    grpc = pytest.importorskip("grpc", reason="needs grpcio")
    words = ["--log-format", "json", "--log-level", "info", "--access-log", "1", "--workers", "2"]
    with serving(f"m={GOLDEN}", *words) as (port, server):
        grpc_port = re.search(r"gRPC on port (\d+)", server.output)[1]
        with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
            assert channel.unary_unary("/grpc.health.v1.Health/Check")(b"") == b"\x08\x01"
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/none")
        assert server.end() == 0
        found = [json.loads(line) for line in server.lines]
    assert {"engine"} == {each["process"] for each in found if "engine_models" in each["logger"]}
    assert {f"listening on 127.0.0.1 port {port}", f"gRPC on port {grpc_port}"} <= {each["message"] for each in found}
    assert any(each["message"].startswith("ready m: ") for each in found)
    asked = {each["path"]: (each["method"], each["status"]) for each in found if each["logger"] == "onecard.access"}
    assert asked == {"/grpc.health.v1.Health/Check": ("Check", 200), "/none": ("GET", 404)}


@pytest.mark.parametrize(("form", "level", "said"), [("xml", "info", "human or json"), ("json", "loud", "warning")])
def test_an_unknown_form_or_level(tree, form, level, said):
    with pytest.raises(UsageError, match=said):
        setup_logs(form, level)


@pytest.mark.parametrize("given", [b"a", b"A-z_0.9", b"x" * 128])
def test_a_client_names_its_request(given):
    assert RequestIds()({b"x-request-id": given}) == given.decode()


@pytest.mark.parametrize("given", [b"", b"x" * 129, b"a b", b"a\n", b"a, b", b"\xff", "é".encode(), b"{}"])
def test_a_name_that_cannot_stand_in_a_log_is_replaced(given):
    assert re.fullmatch(r"[0-9a-f]{12}-1", RequestIds()({b"x-request-id": given}))


def test_ids_differ_within_and_between_processes():
    one, other = RequestIds(), RequestIds()
    assert len({ids({}) for ids in (one, other) for _ in range(1000)}) == 2000


@pytest.mark.parametrize(
    ("sample", "asked", "logged"),
    [(1, 100, 100), (0.5, 100, 50), (0.1, 1000, 100), (0.01, 1000, 10), (0.7, 1000, 700), (0, 100, 0)],
)
def test_how_many_are_logged(sample, asked, logged):
    log = AccessLog(sample)
    due = [number for number in range(asked) if log.is_due(404 if number % 2 else 200)]
    assert len(due) == logged
    if sample:
        gaps = {second - first for first, second in itertools.pairwise(due)}
        assert due[0] == 0 and max(gaps) - min(gaps) <= 1  # evenly spread


@pytest.mark.parametrize("sample", [0, 0.001])
def test_failures_of_the_server_are_always_logged(sample):
    log = AccessLog(sample)
    log.is_due(200)
    assert [log.is_due(status) for status in (500, 499, 503, 429, 599)] == [True, False, True, False, True]


@pytest.mark.parametrize("sample", [-0.1, 1.1, float("nan")])
def test_no_such_sample(sample):
    with pytest.raises(UsageError, match="0 to 1"):
        AccessLog(sample)


def test_an_entry_holds_what_it_should_and_no_query(written):
    stream = written("json")
    log = AccessLog(1)
    log.write(ENTRY)
    log.write(Entry("GET", "/v2?token=secret", 503, 0, 5, 2.0, "unix"))
    log.write(Entry("GET", "/" + "x" * 9000, 404, 0, 5, 2.0, "unix"))
    first, second, third = map(json.loads, stream.getvalue().splitlines())
    del first["time"]
    assert first == {
        "level": "info", "logger": "onecard.access", "message": "request", "method": "POST",
        "path": "/v2/models/m/infer", "status": 200, "bytes_in": 12, "bytes_out": 34, "ms": 1.235,
        "client": "192.0.2.7", "model": "m", "request_id": "id-1",
    }  # fmt: skip
    assert (second["path"], second["level"], second["model"]) == ("/v2", "warning", None)
    assert len(third["path"]) == 515
    assert "secret" not in stream.getvalue()

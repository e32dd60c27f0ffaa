"""Worker processes under supervision: real processes that hang, grow, crash and wait."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from onecard.search.processes import Running, Supervisor, Task, is_passing, tail, verdict_of_exit

MIB = 1 << 20


@dataclass(frozen=True)
class Script(Task):
    """A task that runs a piece of Python instead of a worker's role."""

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-c", *self.arguments]


@pytest.fixture
def supervisor():
    made = Supervisor(memory_bytes=300 * MIB)
    yield made
    made.kill_all()


def script(tmp_path: Path, code: str, limit_s: float = 60.0, **options: object) -> Script:
    return Script("candidate", (code,), tmp_path / "logs" / "log.txt", limit_s, **options)


def ended(supervisor: Supervisor, item: Running, within_s: float = 60.0) -> Running:
    deadline = time.monotonic() + within_s
    while item not in supervisor.wait():
        assert time.monotonic() < deadline
    return item


def until(path: Path, within_s: float = 30.0) -> str:
    """The content of a file that a process is about to write."""
    deadline = time.monotonic() + within_s
    while not (path.exists() and path.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return path.read_text()


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # as it may be from one moment to the next
        return False


def run(supervisor: Supervisor, task: Task) -> Running:
    return ended(supervisor, supervisor.start(task))


def test_a_tasks_own_command_is_the_worker(tmp_path):
    task = Task("eager", ("build", "/job", "eager"), tmp_path / "log.txt", 1.0)
    assert task.command == [sys.executable, "-m", "onecard.search.worker", "build", "/job", "eager"]


def test_output_goes_to_the_log_below_the_command(supervisor, tmp_path):
    task = script(tmp_path, "import sys; print('out'); print('err', file=sys.stderr)")
    item = run(supervisor, task)
    assert item.process.returncode == 0
    text = task.log.read_text()
    assert text.startswith(f"$ {sys.executable} -c import sys")
    assert text.endswith("out\nerr\n")
    run(supervisor, task)
    assert task.log.read_text() == 2 * text
    assert supervisor.running == []


def test_a_hang_ends_at_its_limit_and_says_what_it_was_doing(supervisor, tmp_path):
    stage = tmp_path / "stage"
    stage.write_text("compiling B8")
    item = run(supervisor, script(tmp_path, "import time; time.sleep(60)", limit_s=0.5, stage=stage))
    verdict = verdict_of_exit(item)
    assert not is_passing(item)
    assert verdict.reason == "timeout"
    assert verdict.detail == "it did not end within 0 s (while compiling B8)"
    assert "--candidate-time-limit" in verdict.cure


def test_what_grows_over_the_limit_is_out_of_memory(supervisor, tmp_path):
    item = run(supervisor, script(tmp_path, f"import time; block = b'x' * {400 * MIB}; time.sleep(60)"))
    verdict = verdict_of_exit(item)
    assert is_passing(item)
    assert verdict.reason == "out_of_memory"
    assert "of main memory, the limit is 0.3 GiB" in verdict.detail
    assert "--batch" in verdict.cure


CHILD = "import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"


def test_the_memory_of_children_counts(supervisor, tmp_path):
    code = CHILD.format(code=f"import time; block = b'x' * {400 * MIB}; time.sleep(60)")
    assert verdict_of_exit(run(supervisor, script(tmp_path, code))).reason == "out_of_memory"


def test_children_end_with_their_worker(supervisor, tmp_path):
    note = tmp_path / "pid"
    child = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid()) + '\\n'); time.sleep(60)"
    item = supervisor.start(script(tmp_path, CHILD.format(code=child), limit_s=60.0))
    pid = int(until(note))
    supervisor.kill_all()
    assert item.process.returncode == -9
    deadline = time.monotonic() + 30
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("SIGSEGV", "newest version"),
        ("SIGABRT", "log says why"),
        ("SIGILL", "this processor"),
        ("SIGKILL", "memory"),
        ("SIGTERM", "See the log"),
    ],
)
def test_a_signal_has_its_name_and_cure(name, cure, supervisor, tmp_path):
    stage = tmp_path / "stage"
    stage.write_text("loading")
    item = run(supervisor, script(tmp_path, f"import os, signal; os.kill(os.getpid(), signal.{name})", stage=stage))
    verdict = verdict_of_exit(item)
    assert (verdict.reason, verdict.detail) == ("crashed", f"killed by {name} while loading")
    assert cure in verdict.cure
    assert is_passing(item) == (name in ("SIGKILL", "SIGTERM"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has real-time signals")
def test_a_signal_without_a_name_has_its_number(supervisor, tmp_path):
    item = run(supervisor, script(tmp_path, "import os; os.kill(os.getpid(), 40)"))
    assert verdict_of_exit(item).detail == "killed by signal 40"


def test_an_exit_code_without_a_result_is_a_crash(supervisor, tmp_path):
    item = run(supervisor, script(tmp_path, "raise SystemExit(3)"))
    verdict = verdict_of_exit(item)
    assert not is_passing(item)
    assert (verdict.reason, verdict.detail) == ("crashed", "it ended with exit code 3 and no result")


def test_threads_and_waiting_are_told_by_the_environment(tmp_path):
    task = script(tmp_path, "", threads=3, on_call=True)
    assert task.environment["TORCHINDUCTOR_COMPILE_THREADS"] == "3"
    assert task.environment["ONECARD_WORKER_ON_CALL"] == "1"
    assert "ONECARD_WORKER_ON_CALL" not in script(tmp_path, "").environment


ON_CALL = "import sys; print('ready', flush=True); line = sys.stdin.readline(); print('got', line, flush=True)"


def test_a_worker_on_call_waits_and_its_time_counts_from_the_call(supervisor, tmp_path):
    task = script(tmp_path, ON_CALL, limit_s=60.0, on_call=True)
    item = supervisor.start(task)
    item.started -= 3600  # it has waited for an hour
    while "ready" not in task.log.read_text().splitlines():
        assert supervisor.wait() == []
    assert (supervisor.running, supervisor.waiting) == ([], [item])
    assert item.process.poll() is None
    supervisor.call(item)
    ended(supervisor, item)
    assert "got go" in task.log.read_text()
    assert item.verdict is None
    assert item.process.returncode == 0


def test_a_worker_that_died_while_it_waited_is_a_crash_when_it_is_called(supervisor, tmp_path):
    item = supervisor.start(script(tmp_path, "raise SystemExit(4)", on_call=True))
    item.process.wait()
    supervisor.call(item)
    assert "exit code 4" in verdict_of_exit(ended(supervisor, item)).detail


def test_kill_all_ends_those_that_run_and_those_that_wait(supervisor, tmp_path):
    hang = "import time; time.sleep(60)"
    items = [supervisor.start(script(tmp_path, hang, on_call=on_call)) for on_call in (False, True)]
    supervisor.kill_all()
    assert [item.process.returncode for item in items] == [-9, -9]
    assert supervisor.running == supervisor.waiting == []


def test_several_run_at_once(supervisor, tmp_path):
    items = [supervisor.start(script(tmp_path, "import time; time.sleep(1)")) for _ in range(3)]
    start = time.monotonic()
    done: list[Running] = []
    while len(done) < 3:
        done += supervisor.wait()
        assert time.monotonic() - start < 60
    assert {id(item) for item in done} == {id(item) for item in items}


def test_tail_is_the_end_of_a_log_or_nothing(tmp_path):
    log = tmp_path / "log.txt"
    assert tail(log) == ""
    log.write_bytes(b"a" * 9000 + b"\xff end")
    assert len(tail(log)) == 4000
    assert tail(log).endswith("\ufffd end")

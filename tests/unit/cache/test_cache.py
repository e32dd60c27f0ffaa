"""The cache folder: what is in it, who works in it now, and removing what nobody does."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import pytest
from torch import nn

from onecard.api import prepare
from onecard.cache.contents import Entry, read_contents
from onecard.cache.prune import Pruned, Wish, choose, prune
from onecard.cache.use import MARK, in_use, is_file_of
from onecard.errors import StorageError
from onecard.memory.plan import PlanOptions
from onecard.memory.subject import Subject
from onecard.memory.workplace import workplace
from onecard.search.search import Search

DAY_S = 86_400
NOW = datetime.now(timezone.utc)
ALL = Wish(everything=True)

HOLDS_SEARCH = """
import pathlib, sys
from onecard.search.lock import JobLock
lock = JobLock(pathlib.Path(sys.argv[1] + ".lock"))
print("held", flush=True)
sys.stdin.readline()
"""
WORKS_IN = """
import pathlib, sys
from onecard.cache.use import in_use
with in_use(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def make(path: Path, days: float, size: int = 1000, lock: bool = False) -> Path:
    """An entry of two files, last used so many days ago."""
    (path / "deep").mkdir(parents=True)
    (path / "one").write_bytes(b"x" * (size // 2))
    (path / "deep" / "two").write_bytes(b"x" * (size - size // 2))
    if lock:
        path.with_name(f"{path.name}.lock").write_text("1")
    set_age(path, days)
    return path


def search(cache: Path, number: int, days: float, size: int = 1000) -> Path:
    return make(cache / "searches" / f"{number:024x}", days, size, lock=True)


def set_age(path: Path, days: float) -> None:
    when = NOW.timestamp() - days * DAY_S
    lock = path.with_name(f"{path.name}.lock")
    for each in (*path.rglob("*"), path, *([lock] if lock.exists() else [])):
        os.utime(each, (when, when), follow_symlinks=False)


def names(entries: list[Entry] | tuple[Entry, ...]) -> list[str]:
    return [Path(entry.path).name for entry in entries]


def clear(cache: Path, wish: Wish = ALL) -> Pruned:
    return prune(cache, read_contents(cache), wish)


def start(code: str, path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, str(path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_folder_that_does_not_exist_is_empty(cache):
    assert read_contents(cache) == []
    assert clear(cache).removed == ()
    assert not cache.exists()


def test_every_kind_with_its_bytes_and_its_last_use(cache):
    search(cache, 1, days=4, size=100)
    make(cache / "training" / ("a" * 32), days=3, size=200)
    make(cache / "training" / f"prune-{'b' * 16}", days=2, size=300)
    make(cache / "plans" / "99999999-abcdefgh", days=5, size=400)
    make(cache / "pycache-torch-2.13.0+cpu", days=1, size=500).chmod(0o700)
    found = read_contents(cache)
    assert [(e.kind, e.bytes, (NOW - e.last_used).days, e.in_use) for e in found] == [
        ("plan", 400, 5, False),
        ("search", 100, 4, False),
        ("training", 200, 3, False),
        ("training", 300, 2, False),
        ("bytecode", 500, 1, False),
    ]


def test_the_lock_of_a_search_tells_when_it_was_last_asked_for(cache):
    path = search(cache, 1, days=9)
    os.utime(path.with_name(f"{path.name}.lock"), (0, NOW.timestamp() - 2 * DAY_S))
    assert [(NOW - e.last_used).days for e in read_contents(cache)] == [2]


def test_a_search_that_answers_from_its_cache_is_used_again(cache):
    def run() -> Path:
        options = {"recipes": ("eager",)}
        again = Search(*prepare(nn.ReLU(), device="cpu", inputs=["x: float32[B,4], B=1..8"], options=options))
        return again.folder.root

    path = run()
    gc.collect()
    set_age(path, days=50)
    bytecode = make(cache / "pycache-torch-1.0", days=50)
    bytecode.chmod(0o700)
    assert choose(read_contents(cache), Wish(unused_s=DAY_S), NOW)
    assert run() == path
    gc.collect()
    chosen = choose(read_contents(cache), Wish(unused_s=DAY_S), NOW)
    assert names(chosen) == [bytecode.name], "of another torch"
    assert names(clear(cache).removed) == [bytecode.name, path.name]
    assert run() == path, "a search begins anew where its lock was removed"


def test_the_age_is_that_of_the_last_use(cache):
    old, new = search(cache, 1, days=31), search(cache, 2, days=29)
    done = clear(cache, Wish(unused_s=30 * DAY_S))
    assert (names(done.removed), done.freed_bytes, done.left_bytes) == ([old.name], 1000, 1000)
    assert sorted(os.listdir(cache / "searches")) == [new.name, f"{new.name}.lock"]


def test_ages_and_times_may_be_any_number(cache):
    odd = search(cache, 1, days=-5_000_000)
    before = search(cache, 2, days=30_000)
    assert names(clear(cache, Wish(unused_s=1e300)).removed) == []
    assert names(clear(cache, Wish(unused_s=1.0)).removed) == [before.name]
    assert names(clear(cache).removed) == [odd.name]


@pytest.mark.parametrize(("keep", "gone"), [(4000, 0), (3999, 1), (3000, 1), (2500, 2), (1, 4)])
def test_the_least_recently_used_go_until_no_more_than_so_much_is_left(cache, keep, gone):
    ages = {1: 2, 2: 4, 3: 1, 4: 3}
    paths = {number: search(cache, number, days) for number, days in ages.items()}
    done = clear(cache, Wish(keep_bytes=keep))
    assert names(done.removed) == [paths[number].name for number in (2, 4, 1, 3)][:gone]
    assert done.left_bytes == 1000 * (4 - gone) <= keep or gone == 4


def test_age_and_size_together(cache):
    for number, days in enumerate((40, 3, 2, 1)):
        search(cache, number, days)
    done = clear(cache, Wish(unused_s=30 * DAY_S, keep_bytes=2000))
    assert names(done.removed) == [f"{0:024x}", f"{1:024x}"]


def test_what_another_process_works_with_stays_until_that_is_killed(cache):
    held, free = search(cache, 1, days=90), search(cache, 2, days=80)
    state = cache / "training" / f"prune-{'b' * 16}"
    bytecode = make(cache / "pycache-torch-1.0", days=70)
    bytecode.chmod(0o700)
    with start(HOLDS_SEARCH, held) as one, start(WORKS_IN, state) as two:
        set_age(held, 90)
        done = clear(cache, Wish(unused_s=DAY_S))
        assert names(done.removed) == [free.name]
        assert sorted(names(done.in_use)) == sorted([held.name, bytecode.name])
        done = clear(cache)
        assert (done.removed, len(done.in_use)) == ((), 3)
        assert (held / "deep" / "two").exists() and (state / MARK).exists()
        one.kill(), two.kill()
    assert sorted(names(clear(cache).removed)) == sorted([held.name, state.name, bytecode.name])
    assert os.listdir(cache / "searches") == os.listdir(cache / "training") == []


def test_what_was_used_since_it_was_looked_at_stays(cache):
    path = search(cache, 1, days=90)
    seen = read_contents(cache)
    os.utime(path.with_name(f"{path.name}.lock"))
    done = prune(cache, seen, ALL)
    assert (done.removed, names(done.in_use)) == ((), [path.name])


def test_two_removals_at_once_do_not_mind_each_other(cache):
    search(cache, 1, days=9), make(cache / "training" / ("a" * 32), days=8)
    seen = read_contents(cache)
    clear(cache)
    assert prune(cache, seen, ALL).failed == ()
    assert read_contents(cache) == []


def test_a_training_holds_its_folder(cache, tmp_path):
    pytest.importorskip("torch_pruning")
    from onecard.training.prune import prune as prune_channels

    seen: list[list[str]] = []

    def observe(progress: object) -> None:
        done = clear(cache)
        seen.append([entry.kind for entry in done.in_use])
        assert done.removed == ()

    body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 4))
    model, _ = prepare(body, device="cpu", inputs=["image: float32[B,3,8,8], B=1..8"], options={})
    prune_channels(model, "flops=0.7", output=tmp_path / "small.pt2", observe=observe)
    assert seen and all(kinds == ["training"] for kinds in seen)
    assert read_contents(cache) == []


def test_a_plan_holds_its_folder(cache):
    spec = prepare(nn.ReLU(), device="cpu", inputs=["x: float32[B,4], B=1..8"], options={})[0].spec
    with workplace(Subject("relu", spec, (), None), PlanOptions(), lambda text: None):
        done = clear(cache)
        assert (done.removed, [entry.kind for entry in done.in_use]) == ((), ["plan"])
        with workplace(Subject("relu", spec, (), None), PlanOptions(), lambda text: None):
            assert len(read_contents(cache)) == 2, "one does not sweep the other away"
    assert read_contents(cache) == []


def test_a_plan_under_way_stays(cache):
    with start(WORKS_IN, cache / "plans" / "99999999-marked"):
        made = cache / "plans" / f"{os.getpid()}-just_made"
        made.mkdir()
        gone = make(cache / "plans" / "99999999-killed", days=0)
        done = clear(cache)
    assert names(done.removed) == [gone.name]
    assert len(done.in_use) == 2


def test_without_locks_what_changed_a_moment_ago_is_in_use(cache, monkeypatch):
    def none(handle: int, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    new, old = search(cache, 1, days=1 / 48), search(cache, 2, days=1 / 12)
    done = clear(cache)
    assert (names(done.removed), names(done.in_use)) == ([old.name], [new.name])


def test_working_in_a_folder_leaves_it_if_something_was_put_there(tmp_path):
    folder = tmp_path / "training" / "state"
    with in_use(folder), in_use(folder):
        assert (folder / MARK).exists()
    assert not folder.exists()
    with in_use(folder):
        (folder / "step-1").touch()
    assert sorted(os.listdir(folder)) == [MARK, "step-1"]
    os.utime(folder / MARK, (0, 0))
    with in_use(folder):
        pass
    assert (folder / MARK).stat().st_mtime > 0


def test_working_in_a_folder_that_cannot_be_made_is_left_to_others_to_tell(tmp_path):
    (tmp_path / "file").touch()
    with in_use(tmp_path / "file" / "state"):
        pass


def test_a_lock_on_a_file_that_was_removed_is_none(tmp_path):
    path = tmp_path / "lock"
    path.touch()
    with path.open() as file:
        assert is_file_of(file.fileno(), path)
        path.unlink()
        assert not is_file_of(file.fileno(), path)
        path.touch()
        assert not is_file_of(file.fileno(), path)


def test_other_things_in_the_folder_stay(cache):
    others = [
        cache / "thesis" / "years of work",
        cache / "notes.txt",
        cache / "searches" / "readme.lock",
        cache / "searches" / "mine" / "job.json",
        cache / "searches" / f"{9:025x}" / "one digit too many",
        cache / "searches" / ".removed-by-me" / "file",
        cache / "training" / "images" / "cat.png",
        cache / "plans" / "for the summer" / "spain",
        cache / "pycache" / "open to others",
        cache / ".removed-thesis-00000000" / "chapter 1",
    ]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    (cache / "pycache").chmod(0o755)
    search(cache, 1, days=1)
    (cache / "searches" / f"{2:024x}").write_text("a file, which onecard never has there")
    assert names(clear(cache).removed) == [f"{1:024x}"]
    assert all(path.read_text() == "mine" for path in others)
    assert (cache / "searches" / f"{2:024x}").exists()


def test_a_file_in_the_place_of_a_folder_is_somebody_elses(cache):
    cache.mkdir()
    (cache / "training").touch()
    assert read_contents(cache) == []
    with pytest.raises(StorageError, match="cannot be read: Not a directory"):
        read_contents(cache / "training")


def test_links_are_not_followed(cache, tmp_path):
    precious = make(tmp_path / "precious", days=1, size=5000)
    path = search(cache, 1, days=1, size=100)
    (path / "deep" / "link").symlink_to(precious)
    (path / "file link").symlink_to(precious / "one")
    (cache / "searches" / f"{2:024x}").symlink_to(precious)
    (cache / "pycache-torch-1.0").symlink_to(precious)
    (found,) = read_contents(cache)
    assert found.bytes < 1000
    assert names(clear(cache).removed) == [path.name]
    assert sorted(os.listdir(precious)) == ["deep", "one"]
    assert (cache / "searches" / f"{2:024x}").is_symlink()


def test_searches_on_another_disk_are_found_through_the_link(cache, tmp_path):
    (tmp_path / "disk").mkdir()
    cache.mkdir()
    (cache / "searches").symlink_to(tmp_path / "disk")
    path = search(cache, 1, days=1)
    assert names(clear(cache).removed) == [path.name]
    assert os.listdir(tmp_path / "disk") == []


INTERRUPTED = """
import os, signal, sys
from onecard.cli import main

number, seen = getattr(signal, sys.argv.pop()), []

def stop_at_the_second_file(event, arguments):
    if event == "os.remove" and str(arguments[0]) in ("one", "two"):
        seen.append(event)
        if len(seen) == 2:
            os.kill(os.getpid(), number)

sys.argv = ["onecard", "cache", "--clear"]
sys.addaudithook(stop_at_the_second_file)
main()
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGKILL", -signal.SIGKILL)])
def test_a_removal_that_is_stopped_leaves_no_half_of_a_search(cache, name, code):
    paths = [search(cache, number, days=9 - number) for number in range(3)]
    command = [sys.executable, "-c", INTERRUPTED, name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert ("stopped: 0 of 3 were removed. Run" in " ".join(done.stderr.split())) == (name == "SIGINT")
    assert not paths[0].exists() and paths[1].exists()
    found = read_contents(cache)
    assert [(e.kind, e.bytes) for e in found] == [("search", 1000), ("search", 1000), ("leftover", 500)]
    assert [e.kind for e in clear(cache, Wish(unused_s=30 * DAY_S)).removed] == ["leftover"]
    assert names(read_contents(cache)) == [path.name for path in paths[1:]]


def test_a_lock_without_a_search_goes_unless_it_is_held(cache):
    left, held = (cache / "searches" / f"{number:024x}" for number in (1, 2))
    left.parent.mkdir(parents=True)
    left.with_suffix(".lock").touch()
    with start(HOLDS_SEARCH, held):
        done = clear(cache, Wish(unused_s=DAY_S))
        assert names(done.removed) == [f"{left.name}.lock"]
        assert os.listdir(cache / "searches") == [f"{held.name}.lock"]


def as_nobody(act: Callable[[], None]) -> int:
    """What an act in a process without rights ended with: 0 if it returned."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setgid(65534)
            os.setuid(65534)
            act()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become a user without rights")
def test_what_another_user_made_is_not_touched_and_the_rest_goes_on(tmp_path):
    import tempfile

    with tempfile.TemporaryDirectory(dir="/tmp") as place:  # pytest's own folders are closed to others
        Path(place).chmod(0o755)
        cache = Path(place) / "cache"
        roots, own = search(cache, 1, days=9), search(cache, 2, days=8)
        for path in (cache, cache / "searches", own, own / "deep", own.with_suffix(".lock")):
            os.chown(path, 65534, 65534)

        def act() -> None:
            done = clear(cache)
            assert names(done.removed) == [own.name]
            assert [(Path(f.path).name, f.why) for f in done.failed] == [(roots.name, "permission denied")]

        assert as_nobody(act) == 0
        assert (roots / "deep" / "two").exists()
        assert not own.exists()
        (cache / "searches").chmod(0o700)
        os.chown(cache / "searches", 0, 0)

        def refused() -> None:
            with pytest.raises(StorageError, match="searches cannot be read: Permission denied"):
                read_contents(cache)

        assert as_nobody(refused) == 0

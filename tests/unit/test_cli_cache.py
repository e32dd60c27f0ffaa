"""``onecard cache`` as it is typed: tables, JSON, exit codes and mistakes."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

from onecard.cache.use import in_use
from onecard.cli import main

DAY_S = 86_400
NAMED = '{"name":"resnet50","more":1}'


@pytest.fixture
def onecard(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A call of the command line: exit code, standard output, standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["onecard", "cache", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, " ".join(printed.err.split())

    return call


@pytest.fixture
def filled(cache: Path) -> Path:
    """Two searches, used on 1 and 2 January 2026, and a pruning's state of the 3rd."""
    for day, name in ((1, f"searches/{1:024x}"), (2, f"searches/{2:024x}"), (3, f"training/prune-{3:016x}")):
        path = cache / name
        path.mkdir(parents=True)
        (path / "job.json").write_text(NAMED + " " * (1024 * day - len(NAMED)))
        when = 1_767_225_600 + (day - 1) * DAY_S + DAY_S // 2
        for each in (path / "job.json", path):
            os.utime(each, (when, when))
    return cache


def rows(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines() if line.strip() and "──" not in line]


def test_an_empty_cache_is_no_error(onecard, cache):
    code, out, err = onecard()
    assert (code, err) == (0, "")
    assert out == f"Nothing is kept in {cache}\n"
    assert onecard("--clear") == (0, f"Nothing to remove; 0 B in {cache}\n", "")
    code, out, _ = onecard("--json")
    total = {"kind": "total", "count": 0, "in_use": 0, "bytes": 0, "oldest": None, "newest": None}
    assert json.loads(out) == {"folder": str(cache), "total": total, "kinds": [], "entries": []}


def test_a_table_of_what_is_there(onecard, filled):
    code, out, err = onecard()
    assert (code, err) == (0, "")
    assert [re.sub(r"\d\d:\d\d", "T", row) for row in rows(out)] == [
        str(filled),
        "kind count in use size oldest use newest use",
        "search 2 0 3.00 KiB 2026-01-01 T 2026-01-02 T",
        "training 1 0 3.00 KiB 2026-01-03 T 2026-01-03 T",
        "total 3 0 6.00 KiB 2026-01-01 T 2026-01-03 T",
    ]


def test_json_of_what_is_there(onecard, filled):
    found = json.loads(onecard("--json")[1])
    assert found["folder"] == str(filled)
    assert found["total"]["bytes"] == 6 * 1024
    assert [(kind["kind"], kind["count"]) for kind in found["kinds"]] == [("search", 2), ("training", 1)]
    assert found["entries"][0] == {
        "kind": "search",
        "path": str(filled / "searches" / f"{1:024x}"),
        "name": "resnet50",
        "bytes": 1024,
        "last_used": "2026-01-01T12:00:00Z",
        "in_use": False,
        "denied": "",
    }


def test_a_dry_run_shows_what_would_go_and_removes_nothing(onecard, filled):
    code, out, _ = onecard("--keep", "3KiB", "--dry-run")
    assert code == 0
    lines = rows(re.sub(r"\d\d:\d\d", "T", out))
    assert lines == [
        "would go size last use what",
        "search 1.00 KiB 2026-01-01 T resnet50 (00000000)",
        "search 2.00 KiB 2026-01-02 T resnet50 (00000000)",
        f"2 entries would go and free 3.00 KiB; 3.00 KiB would be left in {filled}",
    ]
    assert len(json.loads(onecard("--json")[1])["entries"]) == 3


def test_removing_by_size_age_and_all(onecard, filled):
    code, out, _ = onecard("--keep", "5KiB")
    assert (code, rows(out)[-1]) == (0, f"1 entry removed, 1.00 KiB freed; 5.00 KiB left in {filled}")
    with in_use(filled / "training" / f"prune-{3:016x}"):
        code, out, _ = onecard("--prune", "1d")
    assert rows(out)[-1] == f"1 entry removed, 2.00 KiB freed; 3.00 KiB left in {filled}"
    assert rows(onecard("--prune", "4w")[1]) == [f"Nothing to remove; 3.00 KiB in {filled}"], "it was used just now"
    assert onecard("--clear")[0] == 0
    assert rows(onecard()[1]) == [f"Nothing is kept in {filled}"]


def test_what_is_in_use_is_said(onecard, filled):
    with in_use(filled / "training" / f"prune-{3:016x}"):
        code, out, err = onecard("--clear")
        found = json.loads(onecard("--clear", "--json")[1])
    assert (code, err) == (0, "")
    assert f"in use, so it stays: training prune-{3:016x} (3.00 KiB)" in rows(out)
    assert [entry["kind"] for entry in found["in_use"]] == ["training"]


def test_json_of_a_removal(onecard, filled):
    code, out, _ = onecard("--keep", "5KiB", "--json")
    done = json.loads(out)
    assert code == 0
    assert [Path(entry["path"]).name for entry in done.pop("removed")] == [f"{1:024x}"]
    assert done == {
        "folder": str(filled),
        "dry_run": False,
        "in_use": [],
        "failed": [],
        "freed_bytes": 1024,
        "left_bytes": 5 * 1024,
    }


MISTAKES = {
    "--dry-run": "add --prune 30d, --keep 20GiB or --clear",
    "--clear --keep 1GiB": "leave out --prune and --keep",
    "--prune 30": "'30' is not an age such as 12h, 30d or 8w",
    "--prune -3d": "'-3d' is not an age",
    "--prune soon": "'soon' is not an age",
    "--prune d": "'d' is not an age",
    "--keep lots": "'lots' is not a size",
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_mistakes_remove_nothing(onecard, filled, typed):
    code, out, err = onecard(*typed.split())
    assert (code, out) == (2, "")
    assert MISTAKES[typed] in err
    assert len(list(filled.glob("*/*"))) == 3


def test_a_folder_that_is_none_is_one_clear_line(onecard, cache):
    cache.write_text("a file")
    code, out, err = onecard()
    assert (code, out) == (9, "")
    assert err == f"error: the cache {cache} cannot be read: Not a directory. Set ONECARD_CACHE to a folder of yours."


def test_what_cannot_be_removed_is_told_after_the_rest_went(onecard, filled, monkeypatch):
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, *more: f"{1:024x}" not in str(path) and real(path, *more))
    code, out, err = onecard("--clear")
    assert code == 9
    assert rows(out)[-1] == f"2 entries removed, 5.00 KiB freed; 1.00 KiB left in {filled}"
    assert err.startswith(f"error: {filled}/searches/{1:024x} cannot be removed: permission denied.")

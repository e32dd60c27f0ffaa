"""Failures that pass are not kept for the next search; those that would come again are."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest
from torch import nn

from onecard.api import prepare
from onecard.errors import SearchError
from onecard.evidence import Verdict
from onecard.recipe import ORIGINAL
from onecard.search.job import BuildResult, EffortSpec, JobFolder, RunResult, forget_passing, write
from onecard.search.options import Progress
from onecard.search.recipes import parse_recipe
from onecard.search.search import Search

TRACE = parse_recipe("torchscript.trace")


@pytest.mark.parametrize(
    ("result", "kept"),
    [
        (RunResult(Verdict("unavailable", "no compiler", "Install g++.")), False),
        (RunResult(Verdict("crashed", "killed by SIGKILL"), passing=True), False),
        (RunResult(Verdict("crashed", "killed by SIGSEGV")), True),
        (RunResult(Verdict("out_of_memory", "said by the candidate itself")), True),
        (RunResult(Verdict("wrong")), True),
        (RunResult(Verdict("unsupported")), True),
        (RunResult(Verdict("ok")), True),
    ],
)
def test_what_an_earlier_search_left(result: RunResult, kept: bool, tmp_path: Path):
    folder = JobFolder(tmp_path)
    place = folder.candidate(TRACE)
    write(place.build, BuildResult(Verdict("ok")))
    write(place.result, result)
    forget_passing(folder, [TRACE])
    assert (place.build.exists(), place.result.exists()) == (True, kept)
    write(place.build, BuildResult(result.verdict, passing=result.passing))
    forget_passing(folder, [TRACE, ORIGINAL])
    assert place.build.exists() == kept


def search(kill: signal.Signals | None = None) -> Search:
    """A search whose workers that run the original get a signal, like those the kernel picks for lack of memory."""

    def observe(progress: Progress) -> None:
        for item in progress.running:
            if kill is not None and item.task.arguments[0] == "run" and psutil.pid_exists(item.process.pid):
                os.kill(item.process.pid, kill)

    options = {"recipes": ("eager",), "effort": EffortSpec(0.1, 0.1, 0.05, 2)}
    model, settled = prepare(nn.ReLU(), device="cpu", inputs=["x: float32[B,4], B=1..8"], options=options)
    return Search(model, settled, observe=observe)


def test_a_worker_that_was_killed_is_run_again_and_says_nothing_of_an_earlier_role(cache: Path):
    with pytest.raises(SearchError, match=r"killed by SIGKILL") as caught:
        search(signal.SIGKILL).run()
    assert "building" not in str(caught.value)
    evidence = search().run()
    assert [c.verdict.reason for c in evidence.candidates] == ["ok"]


def test_a_worker_that_crashed_is_not(cache: Path):
    for kill in (signal.SIGSEGV, None):
        with pytest.raises(SearchError, match=r"killed by SIGSEGV"):
            search(kill).run()

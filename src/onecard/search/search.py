"""The search: prepare the job, run every candidate in a process of its own, play off, choose.

Whatever is finished is on disk, so a search that was killed goes on where it was; a candidate's failure of
any kind is a row; Ctrl-C ends the trying and goes on to the choice with what there is.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from datetime import datetime, timezone

import msgspec

from onecard.cache.use import renew
from onecard.environment import detect
from onecard.errors import InterruptedSearch, SearchError, UsageError
from onecard.evidence import Candidate, Evidence, Verdict
from onecard.host import cache_folder
from onecard.models.model import Model
from onecard.models.source import save_source
from onecard.recipe import ORIGINAL, Recipe
from onecard.search import bytecode
from onecard.search.build_queue import BuildQueue
from onecard.search.choose import OBJECTIVES, choose, finalists, within_memory
from onecard.search.job import (
    BuildResult,
    Job,
    JobFolder,
    PlayoffResult,
    RunResult,
    forget_passing,
    read,
    write,
)
from onecard.search.key import job_key
from onecard.search.lock import JobLock
from onecard.search.material import Material
from onecard.search.options import Observer, Options, Progress
from onecard.search.outcome import check_original, settled, throttled_notes
from onecard.search.processes import Running, Supervisor, Task, is_passing, tail, verdict_of_exit
from onecard.search.recipes import select_recipes, traits_of
from onecard.spec import default_buckets
from onecard.verify.compare import THRESHOLDS, threshold_of
from onecard.verify.data import Dataset, save_data
from onecard.verify.reference import read_reference

_MEMORY_SHARE = 0.85  # of the machine's memory, for one worker with its children
_CORES_PER_BUILD = 3
_MAX_BUILDS = 5


class Search:
    """One search over one model; :meth:`run` does it.

    Args:
        model: the original.
        options: what is asked.
        data: labelled rows, if any.
        material: what compression may use beside them.
        observe: called several times a second with the state.
    """

    def __init__(
        self,
        model: Model,
        options: Options,
        data: Dataset | None = None,
        observe: Observer | None = None,
        material: Material | None = None,
    ) -> None:
        if options.objective not in OBJECTIVES:
            raise UsageError(f"unknown objective '{options.objective}': expected one of {', '.join(OBJECTIVES)}.")
        self.options = options
        self.model = model
        self.environment = detect(options.device)
        self._data = data
        self._material = material or Material()
        rows = data is not None or self._material.calibration is not None
        limited = options.device_memory is not None
        traits = traits_of(model, self.environment, rows, tuple(self._material.alternatives), limited)
        self.recipes = select_recipes(traits, options.recipes)
        self.buckets = tuple(default_buckets(model.spec, options.batches))
        self.done: dict[str, Candidate] = {}
        self.resumed = 0
        self.phase = "preparing"
        self.interrupted = False
        self._observe = observe or (lambda progress: None)
        self._started = time.monotonic()
        self._start_time = datetime.now(timezone.utc)
        limit = options.worker_memory_bytes or int(self.environment.memory_bytes * _MEMORY_SHARE)
        self._supervisor = Supervisor(limit)
        self.folder = self._prepare()

    def run(self) -> Evidence:
        """Try every recipe and choose.

        Returns:
            All that was found; the artifacts lie in ``self.folder``.

        Raises:
            SearchError: the original itself does not run, so there is nothing to compare with.
            InterruptedSearch: Ctrl-C before the original was measured.
        """
        try:
            evidence = self._search()
        except BaseException:
            self._lock.release()
            raise
        self._lock.finish()
        return evidence

    def _search(self) -> Evidence:
        try:
            notes = self._reference()
            self._candidates()
        except KeyboardInterrupt:
            self._supervisor.kill_all()
            self.interrupted = True
            if ORIGINAL.id not in self.done and not self._known(ORIGINAL):
                raise InterruptedSearch(
                    "stopped before anything was ready; nothing was written.", "Run the same command to go on."
                ) from None
            notes = self._notes()
        notes += check_original(self.done)
        for recipe in self.recipes:
            if recipe.id not in self.done and not self._known(recipe):
                self._skip(recipe)
        try:
            playoff = self._play_off()
        except KeyboardInterrupt:
            self._supervisor.kill_all()
            if self.interrupted:
                raise InterruptedSearch(
                    "stopped; nothing was written.", "What is done is kept: run the same command to go on."
                ) from None
            self.interrupted = True
            playoff = PlayoffResult({}, {})
            notes.append("interrupted in the play-off: the choice rests on the candidates' own measurements")
        return self._evidence(playoff, notes)

    def _prepare(self) -> JobFolder:
        """Write the job's folder, or find the one that an earlier search of the same job left."""
        thresholds = {**THRESHOLDS, **{name: threshold_of(e) for name, e in self.options.thresholds.items()}}
        job = Job(
            self.model.name,
            self.model.spec,
            self.buckets,
            self.options.device,
            self.environment,
            thresholds,
            self.options.effort,
            self.options.metric,
            self.options.max_drop,
            self.options.device_memory,
        )
        key = job_key(self.model, job, self._material.digest(self._data))
        folder = JobFolder(cache_folder() / "searches" / key)
        self._lock = JobLock(folder.root.with_name(f"{key}.lock"))
        renew(cache_folder() / bytecode.folder_name())  # its reading leaves no trace
        if self.options.fresh:
            shutil.rmtree(folder.root, ignore_errors=True)
        forget_passing(folder, self.recipes)
        if not folder.job.exists():
            shutil.rmtree(folder.root, ignore_errors=True)
            folder.root.mkdir(parents=True, mode=0o700)
            notes = [*self.model.extra.get("notes", ()), *save_source(self.model, folder.source, live=True)]
            write(folder.notes, notes)
            if self._data is not None:
                save_data(self._data, folder.data)
            self._material.save(folder.calibration, folder.alternatives)
            write(folder.job, job)
        return folder

    def _reference(self) -> list[str]:
        """The original's answers, computed in a process like everything else."""
        self.phase = "computing the original's answers"
        if not (self.folder.reference / "reference.json").exists():
            log = self.folder.root / "reference.log"
            arguments = ("reference", str(self.folder.root))
            self._supervisor.start(Task("reference", arguments, log, self.options.candidate_time_limit_s))
            (ended,) = self._until_one_ends()
            if not (self.folder.reference / "reference.json").exists():
                verdict = verdict_of_exit(ended)
                last = [line for line in tail(log).splitlines() if line.strip()][-1:]
                why = f"{verdict.detail}. {' '.join(last)}".strip()
                raise SearchError(
                    f"the original itself does not run on {self.options.device}: {why}",
                    f"The whole log is {log}.",
                )
        return self._notes()

    def _notes(self) -> list[str]:
        """What loading, saving and running the original had to say."""
        return [*read(self.folder.notes, list[str]), *read_reference(self.folder.reference).notes]

    def _candidates(self) -> None:
        """Build and run every candidate: builds side by side where there are cores, runs one at a time."""
        waiting = [r for r in self.recipes if not self._known(r)]
        self.resumed = len(self.done)
        builders = max(1, min(_MAX_BUILDS, self.environment.cores // _CORES_PER_BUILD))
        if builders == 1:
            for recipe in waiting:
                if self._out_of_time():
                    return
                if self._build([recipe], 1):
                    self._run(recipe)
        else:
            self._run_in_turn(self._build(waiting, builders))

    def _build(self, recipes: Sequence[Recipe], builders: int) -> list[Recipe]:
        """Build several candidates, and return those that can be run."""
        self.phase = "building"
        built = [r for r in recipes if self._is_built(r)]
        own = [r for r in recipes if r not in built and _artifact_of(r) not in recipes]
        copies = [r for r in recipes if r not in built and r not in own]
        queue = BuildQueue(own, builders)
        while True:
            while not self._out_of_time() and (recipe := queue.next()) is not None:
                self._supervisor.start(self._task("build", recipe, max(1, self.environment.cores // builders)))
            if not self._supervisor.running:
                break
            for ended in self._until_one_ends():
                recipe = next(r for r in recipes if r.id == ended.task.name)
                place = self.folder.candidate(recipe)
                if not place.build.exists():
                    passing = is_passing(ended)
                    write(place.build, BuildResult(verdict_of_exit(ended), ended.seconds, passing=passing))
                build = read(place.build, BuildResult)
                verdict = build.verdict
                if not queue.ended(recipe, verdict):
                    place.build.unlink()
                elif verdict.ok:
                    built.append(recipe)
                else:
                    self._write_failed_build(recipe, build)
        for recipe in copies:
            if self._copy(recipe):
                built.append(recipe)
        order = {r.id: i for i, r in enumerate(recipes)}
        return sorted(built, key=lambda r: order[r.id])

    def _copy(self, recipe: Recipe) -> bool:
        """Give a recipe the artifact of the recipe that it shares it with; a failure is shared too."""
        place, source = self.folder.candidate(recipe), self.folder.candidate(_artifact_of(recipe) or recipe)
        if not source.build.exists():
            return False
        build = read(source.build, BuildResult)
        if build.verdict.ok:
            shutil.rmtree(place.variant, ignore_errors=True)
            shutil.copytree(source.variant, place.variant)
            write(place.build, build)
            return True
        self._write_failed_build(recipe, build)
        return False

    def _write_failed_build(self, recipe: Recipe, build: BuildResult) -> None:
        """What could not be built needs no run."""
        limit_s = self.options.candidate_time_limit_s
        write(self.folder.candidate(recipe).result, RunResult(build.verdict, limit_s=limit_s, passing=build.passing))
        self._known(recipe)

    def _run_in_turn(self, recipes: Sequence[Recipe]) -> None:
        """Run candidates one at a time; while one is measured, the next already imports what it needs."""
        on_call: Running | None = None
        for index, recipe in enumerate(recipes):
            if self._out_of_time():
                break
            following = recipes[index + 1] if index + 1 < len(recipes) else None
            current, on_call = on_call, None
            if following is not None:
                on_call = self._supervisor.start(self._task("run", following, 0, on_call=True))
            self._run(recipe, current)
        if on_call is not None:
            self._supervisor.kill_all()

    def _run(self, recipe: Recipe, on_call: Running | None = None) -> None:
        self.phase = "verifying and timing"
        task = self._task("run", recipe, 0)
        if on_call is None:
            self._supervisor.start(task)
        else:
            self._supervisor.call(on_call)
        (ended,) = self._until_one_ends()
        place = self.folder.candidate(recipe)
        if not place.result.exists():
            write(place.result, RunResult(verdict_of_exit(ended), limit_s=task.limit_s, passing=is_passing(ended)))
        self._known(recipe)

    def _task(self, role: str, recipe: Recipe, threads: int, on_call: bool = False) -> Task:
        place = self.folder.candidate(recipe)
        place.stage.unlink(missing_ok=True)  # of the role before: this one says its own when it begins
        arguments: tuple[str, ...] = (role, str(self.folder.root), recipe.id)
        limit = self.options.candidate_time_limit_s
        arguments = (*arguments, str(limit))
        return Task(recipe.id, arguments, place.log, limit, place.stage, threads, on_call)

    def _until_one_ends(self) -> list[Running]:
        while True:
            ended = self._supervisor.wait()
            self._observe(self.progress())
            if ended:
                return ended

    def progress(self) -> Progress:
        """The state right now."""
        elapsed = time.monotonic() - self._started
        return Progress(
            self.recipes,
            self.done,
            self._supervisor.running,
            elapsed,
            self.options.time_limit_s,
            self.resumed,
            self.phase,
        )

    def _is_built(self, recipe: Recipe) -> bool:
        place = self.folder.candidate(recipe)
        return place.build.exists() and place.variant.exists() and read(place.build, BuildResult).verdict.ok

    def _known(self, recipe: Recipe) -> bool:
        """Take a finished candidate from its files, if it is there and still counts."""
        place = self.folder.candidate(recipe)
        if not place.result.exists():
            return False
        result = read(place.result, RunResult)
        gone = result.verdict.ok and not place.variant.exists()
        may_do_better = result.verdict.reason == "timeout" and result.limit_s < self.options.candidate_time_limit_s
        if gone or may_do_better:
            place.result.unlink()
            place.build.unlink(missing_ok=True)
            return False
        build = read(place.build, BuildResult) if place.build.exists() else BuildResult(result.verdict)
        self.done[recipe.id] = Candidate(
            recipe=recipe,
            verdict=result.verdict,
            measurement=msgspec.structs.replace(result.measurement, build_s=build.seconds),
            errors=result.errors,
            metric=result.metric,
            warnings=(*build.warnings, *result.warnings),
            seconds=build.seconds + result.seconds,
            command=self._command(recipe),
            log=tail(place.log) if not result.verdict.ok else "",
            compression=build.compression,
        )
        self._observe(self.progress())
        return True

    def _command(self, recipe: Recipe) -> str:
        """What reproduces a candidate, with the cache named by its variable, for bundles travel."""
        worker, job = "python -m onecard.search.worker", f"$ONECARD_CACHE/searches/{self.folder.root.name}"
        return " && ".join(f'{worker} {role} "{job}" {recipe.id}' for role in ("build", "run"))

    def _skip(self, recipe: Recipe) -> None:
        reason = "the search was interrupted" if self.interrupted else "the time limit was reached"
        cure = "Run the same command again: what is done is kept." + (
            "" if self.interrupted else " Or raise --time-limit."
        )
        self.done[recipe.id] = Candidate(recipe, Verdict("skipped", f"{reason} before its turn", cure))

    def _out_of_time(self) -> bool:
        return ORIGINAL.id in self.done and time.monotonic() - self._started > self.options.time_limit_s

    def _play_off(self) -> PlayoffResult:
        """Time the finalists in turn in one process; without a rival there is nothing to play."""
        self.phase = "play-off"
        allowed = within_memory([c for c in self.done.values() if c.verdict.ok], self.options.wishes, [])
        picked = finalists([self.done[ORIGINAL.id], *allowed], self.buckets, self.options.objective)
        names = tuple(c.id for c in picked)
        if len(names) == 1:
            return PlayoffResult({}, {})
        if self.folder.playoff.exists():
            earlier = read(self.folder.playoff, PlayoffResult)
            if set(earlier.timings) | set(earlier.absent) == set(names):
                return earlier
            self.folder.playoff.unlink()
        arguments = ("playoff", str(self.folder.root), *names)
        limit = self.options.candidate_time_limit_s * 2
        self._supervisor.start(Task("play-off", arguments, self.folder.root / "playoff.log", limit))
        (ended,) = self._until_one_ends()
        if not self.folder.playoff.exists():
            return PlayoffResult({}, dict.fromkeys(names, verdict_of_exit(ended).detail))
        return read(self.folder.playoff, PlayoffResult)

    def _evidence(self, playoff: PlayoffResult, notes: list[str]) -> Evidence:
        notes += [f"{name} could not take part in the play-off: {why}" for name, why in playoff.absent.items()]
        notes += throttled_notes(playoff)
        if self.interrupted:
            notes.append("the search was interrupted; run the same command again to finish it")
        evidence = Evidence(
            model=self.model.name,
            spec=self.model.spec,
            buckets=self.buckets,
            objective=self.options.objective,
            device=self.options.device,
            environment=self.environment,
            candidates=tuple(self.done[r.id] for r in self.recipes),
            chosen=ORIGINAL.id,
            playoff=playoff.timings,
            reference_error=read_reference(self.folder.reference).fp64_error,
            started=self._start_time.isoformat(timespec="seconds"),
            seconds=time.monotonic() - self._started,
            params=sum(p.numel() for p in self.model.flat.parameters()),
        )
        choice = choose(evidence, self.options.wishes)
        candidates = tuple(settled(c, evidence, choice.chosen) for c in evidence.candidates)
        return msgspec.structs.replace(
            evidence,
            candidates=candidates,
            chosen=choice.chosen,
            ranks=choice.ranks,
            pareto=choice.pareto,
            notes=(*notes, *choice.notes),
        )


def _artifact_of(recipe: Recipe) -> Recipe | None:
    """The recipe whose artifact is the very same: a CUDA graph is captured when its inner backend is loaded."""
    if recipe.backend != "cudagraph":
        return None
    return msgspec.structs.replace(recipe, backend=recipe.mode, mode="")

"""Settling on a scheme: try the calibration methods, then keep the layers that lose most until the gate passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from onecard.calibration.bench import Bench, Run
from onecard.errors import Unsupported
from onecard.evidence import INCOMPARABLE, Compression, LayerError, Trial

Make = Callable[[str, tuple[str, ...]], Run]
"""Compress with a method, keeping these layers as they are, and give back something that runs."""

_LARGEST_SHARE = 0.5  # a variant that keeps more than half of its layers is hardly compressed


def settle(
    scheme: str,
    layers: Sequence[str],
    methods: Sequence[str],
    make: Make,
    bench: Bench,
    rank: Callable[[], Sequence[LayerError]] | None = None,
) -> Compression:
    """Find the method and the layers to keep; the caller then builds the artifact with them.

    Every method is tried with all layers compressed, and the one with the smallest error to the original (of those
    that pass, if any do) stands. If none passes, the layers that lose most are kept in higher precision: one, two,
    four ... until the judge passes it or half of the layers are kept. Past the bench's deadline nothing more is
    tried, and the best so far stands.

    Args:
        scheme: the transform's name.
        layers: the names of all layers that can be compressed.
        methods: calibration methods, at least one; an empty name where there is nothing to choose.
        make: see :data:`Make`; what it raises becomes a failed trial, unless every trial fails.
        bench: judge and progress. Without a judge the first method is taken as it is.
        rank: the sensitivity of the layers, worst first; asked for only if no method passes.

    Returns:
        The record, which is also given to ``bench.record``. The same scheme is settled once per bench.

    Raises:
        Unsupported: there is nothing to compress, or no method works at all.
    """
    if scheme in bench.memo:
        known: Compression = bench.memo[scheme]
        return known
    if not layers:
        raise Unsupported(f"the model has no layer that {scheme} applies to")
    found = Compression(scheme, len(layers), methods[0], rows=bench.rows)
    if bench.judge is not None:
        found = _search(found, layers, methods, make, bench, rank)
    bench.memo[scheme] = found
    bench.record(found)
    return found


def _search(
    found: Compression,
    layers: Sequence[str],
    methods: Sequence[str],
    make: Make,
    bench: Bench,
    rank: Callable[[], Sequence[LayerError]] | None,
) -> Compression:
    failures: list[Exception] = []
    trials = [_try(found.scheme, methods[0], (), make, bench, failures)]
    trials += [_try(found.scheme, method, (), make, bench, failures) for method in methods[1:] if not bench.is_late]
    if len(failures) == len(trials):
        raise failures[0]
    best = min(trials, key=_order)
    ranking: tuple[LayerError, ...] = ()
    if not best.passed and rank is not None and not bench.is_late:
        bench.progress(f"{found.scheme}: finding the layers that lose most")
        ranking = tuple(rank())
        for kept in _growing([r.layer for r in ranking], len(layers)):
            trials.append(_try(found.scheme, best.method, kept, make, bench, failures))
            if trials[-1].passed or bench.is_late:
                break
        best = min(trials, key=_order)
    return Compression(
        found.scheme, len(layers), best.method, best.kept, tuple(trials), ranking, bench.rows, _notes(failures, bench)
    )


def _try(scheme: str, method: str, kept: tuple[str, ...], make: Make, bench: Bench, failures: list[Exception]) -> Trial:
    what = " ".join(filter(None, (scheme, method, f"keeping {len(kept)} layers" if kept else "")))
    bench.progress(f"trying {what}")
    assert bench.judge is not None
    try:
        judged = bench.judge(make(method, kept))
    except Exception as error:  # one method's failure must not end the others
        failures.append(error)
        return Trial(method, kept, INCOMPARABLE)
    return Trial(method, kept, judged.error, judged.metric, judged.passed)


def _order(trial: Trial) -> tuple[bool, int, float, float]:
    """Passing first, then fewest layers kept, then the smaller error.

    A metric says whether a trial passes, but among those that do, one that beats the original does so by chance. Of
    trials that fail, the better metric is nearer.
    """
    worse = -trial.metric if trial.metric is not None and not trial.passed else 0.0
    return (not trial.passed, len(trial.kept) if trial.passed else 0, worse, trial.error)


def _growing(ranked: Sequence[str], layers: int) -> Iterator[tuple[str, ...]]:
    count = 1
    while count <= max(1, int(layers * _LARGEST_SHARE)) and count <= len(ranked):
        yield tuple(ranked[:count])
        count *= 2


def _notes(failures: Sequence[Exception], bench: Bench) -> tuple[str, ...]:
    texts = [f"a trial failed: {type(e).__name__}: {str(e).splitlines()[0][:200]}" for e in failures if str(e)]
    if bench.is_late:
        texts.append("the time was short, so not everything was tried; --candidate-time-limit gives more")
    return tuple(dict.fromkeys(texts))

"""Training data: rows in memory, drawn anew for every epoch, or a stream of batches that need not fit in memory.

The forms are those of :mod:`onecard.verify.data`; there, a function may also yield batches, and is then called anew
for every epoch.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onecard.errors import DataError
from onecard.reference import resolve_callable
from onecard.spec import Spec
from onecard.verify.data import Dataset, batches, check_pair, digest_of, load_data

_FILES = (".npz", ".safetensors")
_MOST_STREAMED_ROWS = 4096  # they have to be held in memory
_EPOCH_SALT = 1_000_003  # keeps the seeds of neighbouring epochs and steps apart


@dataclass(frozen=True)
class TrainingData:
    """What a model is trained on.

    Args:
        source: the file or function, as the user named it.
        spec: of the model whose inputs these are.
        rows: the number of rows in one epoch.
        labelled: True where there are labels.
        digest: SHA-256 over rows and labels, as they were when they were loaded.
        dataset: all rows, or None for a stream.
        stream: opens a stream of batches, or None.
        batch_rows: for a stream, the rows of each of its batches in order.
    """

    source: str
    spec: Spec
    rows: int
    labelled: bool
    digest: str
    dataset: Dataset | None = None
    stream: Callable[[], Iterator[Dataset]] | None = None
    batch_rows: tuple[int, ...] = ()

    def steps(self, batch: int) -> int:
        """The number of batches in one epoch, at most ``batch`` rows each."""
        size = self.batch_size(batch)
        if self.dataset is not None:
            return max(1, self.rows // size)
        return sum(-(-rows // size) for rows in self.batch_rows)

    def batch_size(self, wanted: int) -> int:
        """``wanted``, or the first dimension of a model that takes just one size."""
        first = self.spec.inputs[0].shape[0]
        if isinstance(first, int):
            return first
        return min(wanted, self.rows)

    def batches(self, epoch: int, batch: int, seed: int, start: int = 0) -> Iterator[Dataset]:
        """The batches of one epoch, from the one numbered ``start`` on.

        Rows in memory are drawn by a permutation that depends on ``seed`` and ``epoch`` alone, and those that do not
        fill a last batch wait for another epoch. A stream comes in its own order; a batch of it that is larger
        than ``batch`` rows is cut.

        Raises:
            DataError: a stream's batch does not fit the model, or its function failed.
        """
        size = self.batch_size(batch)
        if self.dataset is not None:
            return self._drawn(self.dataset, epoch, size, seed, start)
        return self._streamed(epoch, size, seed, start)

    def _drawn(self, dataset: Dataset, epoch: int, size: int, seed: int, start: int) -> Iterator[Dataset]:
        generator = torch.Generator().manual_seed(step_seed(seed, epoch, 0))
        order = torch.randperm(self.rows, generator=generator)
        for index in range(start, max(1, self.rows // size)):
            yield take(dataset, order[index * size : (index + 1) * size])

    def _streamed(self, epoch: int, size: int, seed: int, start: int) -> Iterator[Dataset]:
        assert self.stream is not None
        index, source = 0, self.stream()
        for drawn in range(len(self.batch_rows)):
            # So that random augmentation is the same whether or not the steps before were run in this process.
            torch.manual_seed(step_seed(seed, epoch, drawn))
            part = next(source, None)
            if part is None:
                return
            for piece in batches(part, size):
                if index >= start:
                    yield piece
                index += 1


def load_training_data(text: str, spec: Spec) -> TrainingData:
    """Read training data and check it against the model's inputs.

    Args:
        text: an ``.npz`` or ``.safetensors`` file, or ``module:callable`` or ``file.py:callable``. The function
            returns ``(inputs, labels)``, with None for no labels, or gives an iterable of such batches: it is then
            called again for every epoch, and read through once now to be checked and counted.
        spec: the model's inputs.

    Raises:
        DataError: unreadable, empty, holding NaN, or not what the spec asks for.
        UsageError: the text is neither a file nor a reference.
        ModelError: the function's module cannot be imported.
    """
    if Path(text).suffix.lower() in _FILES or ":" not in text:
        return in_memory(load_data(text, spec), spec, text)
    function = resolve_callable(text)
    answer = _called(text, function)
    if _is_pair(answer):
        return in_memory(check_pair(answer, spec, text), spec, text)

    def stream() -> Iterator[Dataset]:
        return _checked_stream(text, _called(text, function), spec)

    first = _checked_stream(text, answer, spec)
    return _surveyed(TrainingData(text, spec, 0, False, "", None, stream), first)


def in_memory(dataset: Dataset, spec: Spec, source: str = "rows") -> TrainingData:
    """Training data of rows that are at hand."""
    return TrainingData(source, spec, dataset.rows, dataset.labels is not None, digest_of(dataset), dataset)


def split_rows(data: TrainingData, share: float) -> tuple[TrainingData, Dataset]:
    """Put the last rows aside, to judge by.

    Args:
        data: in memory or a stream; of a stream the last whole batches are taken, 4,096 rows or little more at most.
        share: of all rows, between 0 and 1.

    Returns:
        What is left to train on, and the rows put aside.

    Raises:
        DataError: there are too few rows to put some aside.
    """
    if data.dataset is None:
        return _split_stream(data, min(int(data.rows * share), _MOST_STREAMED_ROWS))
    unit = data.spec.inputs[0].shape[0]
    unit = unit if isinstance(unit, int) else 1
    aside = max(unit, int(data.rows * share) // unit * unit)
    if data.rows - aside < unit:
        raise _too_few(data)
    order = torch.arange(data.rows)
    rest = in_memory(take(data.dataset, order[:-aside]), data.spec, data.source)
    return rest, take(data.dataset, order[-aside:])


def take(dataset: Dataset, rows: Tensor) -> Dataset:
    """Those rows, in that order.

    Args:
        dataset: the rows to choose from.
        rows: int64[n], their numbers.
    """
    labels = dataset.labels
    if isinstance(labels, dict):
        labels = {name: tensor[rows] for name, tensor in labels.items()}
    elif labels is not None:
        labels = labels[rows]
    return Dataset({name: tensor[rows] for name, tensor in dataset.inputs.items()}, labels, len(rows))


def step_seed(seed: int, epoch: int, step: int) -> int:
    """A seed that follows from the place in the training alone, so that no generator's state need be kept."""
    return (seed * _EPOCH_SALT + epoch) * _EPOCH_SALT + step & (1 << 62) - 1


def _surveyed(data: TrainingData, stream: Iterator[Dataset]) -> TrainingData:
    """Read a stream through once: every row checked before hours of training, and counted for the schedule."""
    digest, counts, labelled = hashlib.sha256(), [], set()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for part in stream:
            digest.update(digest_of(part).encode())
            counts.append(part.rows)
            labelled.add(part.labels is not None)
    if not counts:
        raise DataError(f"the data function '{data.source}' gave no batch.", "It must yield (inputs, labels).")
    if len(labelled) > 1:
        raise DataError(f"the data function '{data.source}' gave labels for some batches only.")
    return replace(data, rows=sum(counts), labelled=labelled.pop(), digest=digest.hexdigest(), batch_rows=tuple(counts))


def _split_stream(data: TrainingData, count: int) -> tuple[TrainingData, Dataset]:
    """Train on all but the last batches, and keep those: they are never drawn again."""
    assert data.stream is not None
    aside = 1
    while sum(data.batch_rows[-aside:]) < count:
        aside += 1
    left = data.batch_rows[:-aside]
    if not left:
        raise _too_few(data)
    with torch.random.fork_rng(devices=[]):
        kept = list(itertools.islice(data.stream(), len(left), len(data.batch_rows)))
    return replace(data, rows=sum(left), batch_rows=left), _joined(kept, data.source)


def _too_few(data: TrainingData) -> DataError:
    return DataError(
        f"{data.source} has too few rows ({data.rows}) to train on and to judge by.",
        "Give more rows, or others to judge by with --data.",
    )


def _joined(parts: list[Dataset], source: str) -> Dataset:
    labels: list[dict[str, Tensor]] = []
    for part in parts:
        named = part.labels if isinstance(part.labels, dict) else {"": part.labels}
        labels.append({name: tensor for name, tensor in named.items() if tensor is not None})
    try:
        inputs = {name: torch.cat([p.inputs[name] for p in parts]) for name in parts[0].inputs}
        whole = {name: torch.cat([named[name] for named in labels]) for name in labels[0]}
    except (RuntimeError, KeyError) as error:
        raise DataError(
            f"the last batches of '{source}' cannot be joined, since their sizes differ.",
            "Pad them to one size, or give rows to judge by with --data.",
        ) from error
    joined = whole[""] if set(whole) == {""} else whole
    return Dataset(inputs, joined if whole else None, len(next(iter(inputs.values()))))


def _called(text: str, function: Callable[..., Any]) -> Any:
    try:
        return function()
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"the data function '{text}' failed with {type(error).__name__}: {error}.") from error


def _checked_stream(text: str, answer: Any, spec: Spec) -> Iterator[Dataset]:
    """Each batch of a user's iterable, checked like a file's rows."""
    try:
        source = iter(answer)
    except TypeError as error:
        raise DataError(
            f"the data function '{text}' returned a {type(answer).__name__}.",
            "It must return (inputs, labels) or yield such batches.",
        ) from error
    while True:
        try:
            pair = next(source)
        except StopIteration:
            return
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"the data function '{text}' failed with {type(error).__name__}: {error}.") from error
        yield check_pair(pair, spec, text)


def _is_pair(value: Any) -> bool:
    if not isinstance(value, tuple | list) or len(value) != 2:  # noqa: PLR2004 - a pair
        return False
    return isinstance(value[0], Mapping | Tensor) or hasattr(value[0], "__array__")

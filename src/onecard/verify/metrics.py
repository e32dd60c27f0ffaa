"""The task's own metric on labelled data: the outputs of a whole data set and its labels in, one figure out.

Higher is better for all of them, and every figure is finite: a row with NaN in it counts as wrong.

**Which output is taken.** The first, in the order of the model's outputs, whose dtype and shape fit the
metric and the labels. Labels given as a dict with a single entry count as that entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from onecard.errors import DataError, UsageError
from onecard.reference import resolve_callable
from onecard.verify import spans

Outputs = dict[str, Tensor]
Labels = Tensor | dict[str, Tensor]
MetricFunction = Callable[[Outputs, Labels], float]

IGNORED_CLASS = 255
"""The label of pixels without a class in PASCAL VOC, Cityscapes and ADE20K; negative ones are ignored too."""

PSNR_LIMIT_DB = 200.0
"""Equal pictures have an infinite PSNR, which no JSON file can hold."""

_ROWS = 1024


def get_metric(name: str) -> MetricFunction:
    """Find a metric by its name.

    Args:
        name: a key of :data:`METRICS`, for ``recall`` and ``psnr`` with a figure of one's own behind the ``@``
            (``recall@10``, ``psnr@255``), or ``module:callable`` or ``file.py:callable`` for a function of the
            user: ``f(outputs, labels) -> float``.

    Returns:
        A function of the outputs (name to tensor, all rows of the data set in order) and the labels.

    Raises:
        UsageError: there is no such metric; the message lists those that exist.
        ModelError: the user's file or module cannot be imported.
    """
    if name in METRICS:
        return METRICS[name]
    head, at, figure = name.partition("@")
    if at and head in _WITH_FIGURE:
        try:
            return _WITH_FIGURE[head](figure)
        except ValueError:
            raise UsageError(f"'{figure}' in the metric '{name}' is not a positive figure.") from None
    if ":" in name:
        return _checked(name, resolve_callable(name))
    raise UsageError(
        f"unknown metric '{name}': expected one of {', '.join(METRICS)},",
        "recall@K or psnr@PEAK, or 'module:callable' for a function f(outputs, labels) -> float of your own.",
    )


def accuracy(outputs: Outputs, labels: Labels) -> float:
    """The share of right classes.

    Takes scores float[N, ..., C] for labels int[N, ...], or classes int[N, ...]. Negative labels are ignored.
    """
    predicted, wanted = _classes(outputs, labels)
    return float((predicted == wanted).double().mean())


def top5(outputs: Outputs, labels: Labels) -> float:
    """The share of rows whose class is among the five highest scores, float[N, ..., C] with C >= 5."""
    wanted = _integers(labels)
    scores = _find(outputs, lambda t: _is_scores(t, wanted, 5), f"scores [{_shape(wanted)}, C >= 5]")
    scores, wanted = _kept(scores, wanted)
    _check_range(wanted, scores.shape[-1])
    hit = (scores.float().topk(5, dim=-1).indices == wanted.unsqueeze(-1)).any(-1)
    return float((hit & ~scores.isnan().any(-1)).double().mean())


def f1(outputs: Outputs, labels: Labels) -> float:
    """Macro F1: the mean over the classes, that are labelled or predicted, of each class's F1."""
    predicted, wanted = _classes(outputs, labels)
    scores = []
    for label in torch.unique(torch.cat([predicted[predicted >= 0], wanted])).tolist():
        said, true = predicted == label, wanted == label
        scores.append(2 * int((said & true).sum()) / (int(said.sum()) + int(true.sum())))
    return sum(scores) / len(scores)


def recall_at(k: int) -> MetricFunction:
    """The metric: how many embeddings have one of their own group among the ``k`` nearest others, by cosine.

    Takes embeddings float[N, D] and group numbers int[N]. Rows that are alone in their group are left out,
    for nothing could be right for them.
    """

    def recall(outputs: Outputs, labels: Labels) -> float:
        groups = _integers(labels)
        rows = _find(outputs, lambda t: t.is_floating_point() and t.dim() == 2 and len(t) == len(groups), "[N, D]")  # noqa: PLR2004
        groups = groups.to(rows.device)
        _, inverse, counts = torch.unique(groups, return_inverse=True, return_counts=True)
        queries = (counts[inverse] > 1).nonzero().flatten()
        if not len(queries):
            raise DataError("no two rows have the same label.", "recall@k needs groups of at least two rows.")
        broken = rows.isnan().any(-1)
        unit = torch.nn.functional.normalize(rows.float().nan_to_num(), dim=-1)
        hits = 0
        for part in torch.split(queries, _ROWS):
            cosines = unit[part] @ unit.T
            cosines[:, broken] = -2.0  # below any cosine
            cosines[torch.arange(len(part), device=part.device), part] = -3.0
            nearest = cosines.topk(min(k, len(rows) - 1), dim=-1).indices
            hit = (groups[nearest] == groups[part].unsqueeze(-1)).any(-1)
            hits += int((hit & ~broken[part]).sum())
        return hits / len(queries)

    return recall


def cosine(outputs: Outputs, labels: Labels) -> float:
    """The mean over rows of the cosine between an output and its target of the same shape.

    Targets in a dict are paired with the outputs of the same names, and their means averaged.
    """
    means = []
    for output, target in _pairs(outputs, labels):
        a, b = output.double().flatten(1), target.to(output.device).double().flatten(1)
        means.append(float(torch.nn.functional.cosine_similarity(a, b).nan_to_num(nan=-1.0).mean()))
    return sum(means) / len(means)


def psnr_of(peak: float) -> MetricFunction:
    """The metric: mean peak signal-to-noise ratio in dB between pictures and targets of the same shape.

    Args:
        peak: the difference between the largest and the smallest value that a picture can hold (1.0, 255).
    """
    if not (math.isfinite(peak) and peak > 0):
        raise ValueError(peak)

    def psnr(outputs: Outputs, labels: Labels) -> float:
        means = []
        for output, target in _pairs(outputs, labels):
            error = (output.double() - target.to(output.device).double()).flatten(1).square().mean(1)
            decibels = 10 * torch.log10(peak**2 / error)
            limited = decibels.nan_to_num(nan=-PSNR_LIMIT_DB).clamp(-PSNR_LIMIT_DB, PSNR_LIMIT_DB)
            means.append(float(limited.mean()))
        return sum(means) / len(means)

    return psnr


def miou(outputs: Outputs, labels: Labels) -> float:
    """Mean intersection over union of scores float[N, C, H, W] and label maps int[N, H, W].

    The mean is over the classes that are labelled or predicted somewhere; pixels with a negative label or
    255 are ignored.
    """
    wanted = _integers(labels)
    scores = _find(
        outputs,
        lambda t: t.is_floating_point() and t.dim() >= 3 and (t.shape[0], *t.shape[2:]) == tuple(wanted.shape),  # noqa: PLR2004
        "scores [N, C, H, W] for labels [N, H, W]",
    )
    count = scores.shape[1]
    confusion = torch.zeros(count * (count + 1), dtype=torch.int64, device=scores.device)
    for part, labels_part in zip(torch.split(scores, 16), torch.split(wanted.to(scores.device), 16), strict=True):
        keep = (labels_part >= 0) & ((labels_part != IGNORED_CLASS) | (count > IGNORED_CLASS))
        predicted = part.argmax(1)
        predicted[part.isnan().any(1)] = count  # a column of its own, right for no class
        _check_range(labels_part[keep], count)
        cells = labels_part[keep] * (count + 1) + predicted[keep]
        confusion += torch.bincount(cells, minlength=len(confusion))
    table = confusion.view(count, count + 1).double()  # [label, predicted]
    both = table[:, :count].diagonal()
    either = table.sum(1) + table[:, :count].sum(0) - both
    if not bool((either > 0).any()):
        raise DataError("every pixel of the labels is to be ignored.", "Check the values of the label maps.")
    return float((both[either > 0] / either[either > 0]).mean())


def _classes(outputs: Outputs, labels: Labels) -> tuple[Tensor, Tensor]:
    """Predicted and labelled classes, both int[n], without those to be ignored; -1 is predicted from NaN."""
    wanted = _integers(labels)
    answer = _find(
        outputs,
        lambda t: _is_scores(t, wanted, 2) or (_is_integer(t) and t.shape == wanted.shape),
        f"scores [{_shape(wanted)}, C >= 2] or classes int[{_shape(wanted)}]",
    )
    answer, wanted = _kept(answer, wanted)
    if _is_integer(answer):
        return answer.long(), wanted
    _check_range(wanted, answer.shape[-1])
    predicted = answer.argmax(-1)
    predicted[answer.isnan().any(-1)] = -1
    return predicted, wanted


def _kept(answer: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Answers and labels, flattened over all but classes, where a label is not negative."""
    wanted = wanted.to(answer.device)
    keep = wanted >= 0
    if not bool(keep.any()):
        raise DataError("every label is negative, which means to ignore it.", "Check the labels.")
    return answer[keep], wanted[keep]


def _pairs(outputs: Outputs, labels: Labels) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs with their targets: by name from a dict, else the first output of the target's shape."""
    targets = labels if isinstance(labels, dict) else {}
    if targets and set(targets) <= set(outputs):
        for name, target in targets.items():
            if outputs[name].shape != target.shape:
                shapes = f"{list(target.shape)}, but the output is {list(outputs[name].shape)}"
                raise DataError(f"the target of '{name}' is {shapes}.")
            yield outputs[name], target
        return
    target = _lone(labels)
    yield _find(outputs, lambda t: t.shape == target.shape, f"[{_shape(target)}]"), target


def _find(outputs: Outputs, fits: Callable[[Tensor], bool], wanted: str) -> Tensor:
    for tensor in outputs.values():
        if fits(tensor):
            return tensor
    shapes = ", ".join(f"{name}: {str(t.dtype)[6:]}{list(t.shape)}" for name, t in outputs.items())
    raise DataError(
        f"no output fits the metric and the labels: expected {wanted}, got {shapes}.",
        "Check the labels' shape, or pass a function of your own as the metric ('file.py:callable').",
    )


def _is_scores(tensor: Tensor, labels: Tensor, classes: int) -> bool:
    fits = tensor.dim() == labels.dim() + 1 and tensor.shape[:-1] == labels.shape
    return tensor.is_floating_point() and fits and tensor.shape[-1] >= classes


def _is_integer(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex()


def _integers(labels: Labels) -> Tensor:
    label = _lone(labels)
    if not _is_integer(label):
        raise DataError(f"the labels are {str(label.dtype)[6:]}, expected class numbers.", "Save them as int64.")
    return label.long()


def _lone(labels: Labels) -> Tensor:
    if isinstance(labels, Tensor):
        return labels
    if len(labels) != 1:
        raise DataError(f"this metric takes one tensor of labels, got {sorted(labels)}.")
    return next(iter(labels.values()))


def _check_range(labels: Tensor, classes: int) -> None:
    if labels.numel() and int(labels.max()) >= classes:
        raise DataError(f"a label is {int(labels.max())}, but the output has only the classes 0..{classes - 1}.")


def _shape(tensor: Tensor) -> str:
    return ", ".join(map(str, tensor.shape))


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def _checked(name: str, function: Callable[..., object]) -> MetricFunction:
    """A user's metric whose failures and answers are translated."""

    def metric(outputs: Outputs, labels: Labels) -> float:
        try:
            value = function(outputs, labels)
        except Exception as error:
            raise DataError(f"the metric '{name}' failed with {type(error).__name__}: {error}.") from error
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        try:
            return float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise DataError(f"the metric '{name}' returned a {type(value).__name__}, expected a number.") from None

    return metric


METRICS: dict[str, MetricFunction] = {
    "accuracy": accuracy,
    "top5": top5,
    "f1": f1,
    "exact_match": spans.exact_match,
    "span_f1": spans.span_f1,
    "recall@1": recall_at(1),
    "recall@5": recall_at(5),
    "cosine": cosine,
    "psnr": psnr_of(1.0),
    "miou": miou,
}
"""The metrics by name."""

_WITH_FIGURE: dict[str, Callable[[str], MetricFunction]] = {
    "recall": lambda text: recall_at(_positive(text)),
    "psnr": lambda text: psnr_of(float(text)),
}

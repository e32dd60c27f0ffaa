"""Question answering: the span of tokens with the best scores, and how well it meets the labelled span.

Outputs are scores of start and end, float[N, S] each: those with "start" and "end" in their names, else the
first two outputs of one such shape, else the first that is float[N, S, 2]. Labels are the first and the last
token, both included: ``start`` and ``end`` (or ``start_positions`` and ``end_positions``) int[N], or one
int[N, 2]. "No answer" is a span like any other, by custom (0, 0).

Scores of padding and of the question take part: mask them in the model, as the data's tokens are not known here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from onecard.errors import DataError

_NAMES = (("start", "end"), ("start_positions", "end_positions"))


def exact_match(outputs: dict[str, Tensor], labels: Tensor | dict[str, Tensor]) -> float:
    """The share of rows whose best span is just the labelled one."""
    found, wanted = _spans(outputs, labels)
    return float((found == wanted).all(-1).double().mean())


def span_f1(outputs: dict[str, Tensor], labels: Tensor | dict[str, Tensor]) -> float:
    """The mean over rows of F1 between the tokens of the best span and of the labelled one.

    F1 as in SQuAD (Rajpurkar et al. 2016), over token positions rather than words.
    """
    found, wanted = _spans(outputs, labels)
    first = torch.maximum(found[:, 0], wanted[:, 0])
    last = torch.minimum(found[:, 1], wanted[:, 1])
    shared = (last - first + 1).clamp(min=0)
    shared[found[:, 0] < 0] = 0
    lengths = (found[:, 1] - found[:, 0] + 1) + (wanted[:, 1] - wanted[:, 0] + 1)
    return float((2 * shared / lengths).double().mean())


def best_spans(start: Tensor, end: Tensor) -> Tensor:
    """The span with the highest sum of scores that does not end before it starts.

    Args:
        start: scores float[N, S] of each token to be the first.
        end: scores float[N, S] of each token to be the last.

    Returns:
        int[N, 2], first and last token; -1 in rows with NaN.
    """
    # The best start for each end is the running maximum, so this takes N·S steps, not N·S².
    best, position = torch.cummax(start.float(), dim=-1)
    last = (best + end.float()).argmax(-1, keepdim=True)
    found = torch.cat([position.gather(-1, last), last], dim=-1)
    found[(start.isnan() | end.isnan()).any(-1)] = -1
    return found


def _spans(outputs: dict[str, Tensor], labels: Tensor | dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    wanted = _labelled(labels)
    start, end = _scores(outputs, len(wanted))
    wanted = wanted.to(start.device)
    if bool((wanted < 0).any() | (wanted >= start.shape[-1]).any() | (wanted[:, 0] > wanted[:, 1]).any()):
        raise DataError(
            f"a labelled span is not within the {start.shape[-1]} tokens, or ends before it starts.",
            "Label the first and the last token of the answer, both included.",
        )
    return best_spans(start, end), wanted


def _labelled(labels: Tensor | dict[str, Tensor]) -> Tensor:
    if isinstance(labels, dict):
        for names in _NAMES:
            if set(names) == set(labels) and all(labels[name].dim() == 1 for name in names):
                labels = torch.stack([labels[name] for name in names], dim=-1)
                break
        else:
            labels = next(iter(labels.values())) if len(labels) == 1 else torch.empty(0)
    if labels.dim() != 2 or labels.shape[1] != 2 or labels.is_floating_point():  # noqa: PLR2004 - [N, 2]
        raise DataError(
            "spans are labelled by the integers 'start' and 'end' [N] each, or one [N, 2].",
            "Name the arrays label_start and label_end.",
        )
    return labels.long()


def _scores(outputs: dict[str, Tensor], rows: int) -> tuple[Tensor, Tensor]:
    flat = {n: t for n, t in outputs.items() if t.is_floating_point() and t.dim() == 2 and len(t) == rows}  # noqa: PLR2004
    start = next((t for name, t in flat.items() if "start" in name), None)
    end = next((t for name, t in flat.items() if "end" in name), None)
    if start is not None and end is not None and start.shape == end.shape:
        return start, end
    tensors = list(flat.values())
    for index, first in enumerate(tensors):
        for second in tensors[index + 1 :]:
            if first.shape == second.shape:
                return first, second
    for tensor in outputs.values():
        if tensor.is_floating_point() and tensor.dim() == 3 and len(tensor) == rows and tensor.shape[2] == 2:  # noqa: PLR2004
            return tensor[..., 0], tensor[..., 1]
    shapes = ", ".join(f"{name}: {str(t.dtype)[6:]}{list(t.shape)}" for name, t in outputs.items())
    raise DataError(f"no outputs look like scores of start and end [{rows}, S], got {shapes}.")

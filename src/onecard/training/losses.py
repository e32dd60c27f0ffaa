"""What a training minimises: the user's function, the labels' cross-entropy, or the distance from the fp32 original.

Distillation follows Hinton et al. 2015 (https://arxiv.org/abs/1503.02531): softened classes, scaled by the square of
the temperature; an output that is no logits is compared by its mean squared error, relative to the variance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from onecard.errors import DataError, UsageError
from onecard.reference import resolve_callable
from onecard.verify.compare import looks_like_logits
from onecard.verify.data import Labels
from onecard.verify.metrics import IGNORED_CLASS

Named = dict[str, Tensor]
Loss = Callable[[Named, Labels, Named | None], Tensor]
"""The student's outputs, the labels and the teacher's outputs (or None) to a scalar."""

TEMPERATURE = 2.0
DISTILLATION_WEIGHT = 0.5
"""The teacher's share of the loss where there are labels too."""

_IGNORED = -100  # of torch's cross-entropy
_TINY = 1e-12


def get_loss(name: str, labelled: bool, teacher: bool) -> Loss:
    """The loss that fits.

    Args:
        name: ``module:callable`` or ``file.py:callable`` of ``f(outputs, labels) -> scalar tensor``, or empty.
        labelled: True where the data has labels.
        teacher: True where the original answers beside the student.

    Raises:
        UsageError: no such function, or nothing to learn from.
        ModelError: the user's module cannot be imported.
    """
    if name:
        return _user_loss(name)
    if labelled:
        return _labelled_and_taught if teacher else _labelled
    if teacher:
        return _taught
    raise UsageError("the training data has no labels.", "Add an array 'label', or pass a function with --loss.")


def label_loss(outputs: Named, labels: Labels) -> Tensor:
    """Cross-entropy for integer labels, and mean squared error, relative to their variance, for others.

    Labels are paired with outputs by name (``start`` with ``start`` or ``start_logits``); labels without a name go
    with the first output whose shape fits. Negative classes and 255 are ignored, as in :mod:`onecard.verify.metrics`.

    Raises:
        DataError: no output fits the labels.
    """
    if labels is None:
        raise DataError("the training data has no labels.", "Add an array 'label'.")
    named = labels if isinstance(labels, dict) else {"": labels}
    losses = [_one_label_loss(_candidates(outputs, name, len(named)), label, name) for name, label in named.items()]
    return torch.stack(losses).mean()


def distillation_loss(outputs: Named, teacher: Named) -> Tensor:
    """The mean over the floating-point outputs of their distance from the teacher's."""
    losses = []
    for name, answer in teacher.items():
        if not answer.is_floating_point():
            continue
        out, wanted = outputs[name].float(), answer.float()
        if looks_like_logits(wanted):
            soft = functional.log_softmax(out / TEMPERATURE, 1), functional.log_softmax(wanted / TEMPERATURE, 1)
            losses.append(functional.kl_div(*soft, reduction="batchmean", log_target=True) * TEMPERATURE**2)
        else:
            losses.append(functional.mse_loss(out, wanted) / _spread(wanted))
    if not losses:
        raise UsageError("the model has no floating-point output to learn by.", "Pass a function with --loss.")
    return torch.stack(losses).mean()


def _labelled(outputs: Named, labels: Labels, teacher: Named | None) -> Tensor:
    del teacher
    return label_loss(outputs, labels)


def _taught(outputs: Named, labels: Labels, teacher: Named | None) -> Tensor:
    del labels
    assert teacher is not None
    return distillation_loss(outputs, teacher)


def _labelled_and_taught(outputs: Named, labels: Labels, teacher: Named | None) -> Tensor:
    assert teacher is not None
    hard, soft = label_loss(outputs, labels), distillation_loss(outputs, teacher)
    return (1 - DISTILLATION_WEIGHT) * hard + DISTILLATION_WEIGHT * soft


def _user_loss(name: str) -> Loss:
    function = resolve_callable(name)

    def loss(outputs: Named, labels: Labels, teacher: Named | None) -> Tensor:
        del teacher
        try:
            value: Any = function(outputs, labels)
        except Exception as error:
            raise UsageError(f"the loss '{name}' failed with {type(error).__name__}: {error}.") from error
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            found = f"{str(value.dtype)[6:]}{list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UsageError(f"the loss '{name}' returned {found}, expected a scalar tensor.", "Return loss.mean().")
        if not value.requires_grad:
            raise UsageError(
                f"the loss '{name}' does not depend on the outputs.", "Compute it with torch from 'outputs'."
            )
        return value.reshape(())

    return loss


def _candidates(outputs: Named, label: str, labels: int) -> Named:
    if labels == 1 and label not in outputs:
        return outputs
    near = {name: t for name, t in outputs.items() if name == label or name.startswith(f"{label}_")}
    if not near:
        raise DataError(
            f"no output belongs to the label '{label}': the outputs are {', '.join(outputs)}.",
            "Name labels like outputs, or pass a function with --loss.",
        )
    return near


def _one_label_loss(outputs: Named, label: Tensor, name: str) -> Tensor:
    for output in outputs.values():
        if not output.is_floating_point():
            continue
        if label.is_floating_point():
            if output.shape == label.shape:
                return functional.mse_loss(output.float(), label.float()) / _spread(label.float())
        elif (scores := _scores_of(output, label)) is not None:
            return _cross_entropy(scores, label.long())
    shapes = ", ".join(f"{key}: {str(t.dtype)[6:]}{list(t.shape)}" for key, t in outputs.items())
    what = f"'{name}' " if name else ""
    raise DataError(
        f"no output fits the labels {what}{str(label.dtype)[6:]}{list(label.shape)}: the outputs are {shapes}.",
        "Mend the labels' shape, or pass a function f(outputs, labels) with --loss.",
    )


def _scores_of(output: Tensor, label: Tensor) -> Tensor | None:
    """The output as scores [N, C, ...] for labels [N, ...], whether its classes lie last or second."""
    if output.dim() != label.dim() + 1:
        return None
    if (output.shape[0], *output.shape[2:]) == tuple(label.shape) and output.shape[1] > 1:
        return output
    return output.movedim(-1, 1) if output.shape[:-1] == label.shape and output.shape[-1] > 1 else None


def _cross_entropy(scores: Tensor, label: Tensor) -> Tensor:
    classes = scores.shape[1]
    ignored = (label < 0) | ((label == IGNORED_CLASS) & (classes <= IGNORED_CLASS))
    if bool(((label >= classes) & ~ignored).any()):
        raise DataError(f"a label is {int(label.max())}, but the output has only the classes 0..{classes - 1}.")
    return functional.cross_entropy(scores.float(), label.masked_fill(ignored, _IGNORED), ignore_index=_IGNORED)


def _spread(wanted: Tensor) -> Tensor:
    """The variance, or the mean square where all values are the same."""
    variance = wanted.var(unbiased=False)
    return torch.where(variance > _TINY, variance, wanted.square().mean()).clamp_min(_TINY)

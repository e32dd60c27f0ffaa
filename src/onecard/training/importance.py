"""What each channel is worth: by the size of its weights, or by what the loss would change without it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from onecard.errors import UsageError
from onecard.models.flat import FlatModule, by_name
from onecard.spec import Spec
from onecard.training.channels import ChannelGroup, Inputs, Removal, full_group
from onecard.training.data import TrainingData
from onecard.training.loop import TrainOptions
from onecard.training.losses import get_loss
from onecard.verify.compare import looks_like_logits
from onecard.verify.data import Dataset
from onecard.verify.reference import to_device

CRITERIA = ("magnitude", "taylor")
_BATCHES = 32  # the order of the channels hardly changes with more


@dataclass(frozen=True)
class Block:
    """Channels that go at once: the layer that leads their group, their numbers, and what they are worth."""

    root: str
    channels: tuple[int, ...]
    score: float


def rank_blocks(module: FlatModule, inputs: Inputs, groups: Sequence[ChannelGroup], criterion: str) -> list[Block]:
    """All blocks that can go, the least important first, over all groups.

    The importance of a channel is the mean, over the layers that lose it, of its weights' squared norm ("magnitude") or
    of |gradient x weight| ("taylor", Molchanov et al. 2019, https://arxiv.org/abs/1906.10771), relative to
    the mean of its group.

    Args:
        module: with gradients (:func:`accumulate_gradients`) for ``taylor``.
        inputs: an example for tracing.
        groups: what can be pruned.
        criterion: one of :data:`CRITERIA`.
    """
    estimate = _estimator(criterion)
    blocks = []
    for group, full in zip(groups, full_group(module, inputs, [g.root for g in groups]), strict=True):
        scores: Tensor = estimate(full).nan_to_num(0.0).cpu()
        worth = scores[torch.tensor(group.units)].mean(1)
        order = worth.argsort(stable=True).tolist()
        start = 0
        for size in group.block_sizes:
            chosen = order[start : start + size]
            channels = tuple(sorted(i for unit in chosen for i in group.units[unit]))
            blocks.append(Block(group.root, channels, float(worth[chosen].mean())))
            start += size
    return sorted(blocks, key=lambda block: block.score)


def join(blocks: Iterable[Block]) -> Removal:
    """The channels of several blocks by the layer that leads them."""
    removal: Removal = {}
    for block in blocks:
        removal[block.root] = tuple(sorted((*removal.get(block.root, ()), *block.channels)))
    return removal


def accumulate_gradients(module: FlatModule, data: TrainingData, options: TrainOptions, spec: Spec) -> None:
    """Leave in every parameter the root mean square of its gradient over some batches.

    The loss is the task's. Rows without labels are given answers drawn from the model's own distribution, as for
    the Fisher information: distillation from itself would have no gradient at all.

    Args:
        module: on the options' device, in evaluation mode.
        data: the rows.
        options: batch size, loss, seed and device.
        spec: names of inputs and outputs.
    """
    loss = get_loss(options.loss, data.labelled, False) if data.labelled or options.loss else None
    squares = {name: torch.zeros_like(p) for name, p in module.named_parameters() if p.requires_grad}
    generator = torch.Generator(options.device).manual_seed(options.seed)
    count = 0
    for batch in islice(data.batches(0, options.batch, options.seed), _BATCHES):
        module.zero_grad(set_to_none=True)
        with torch.enable_grad():
            outputs = _run(module, batch, spec, options.device)
            labels = _moved(batch.labels, options.device)
            value = loss(outputs, labels, None) if loss else _self_loss(outputs, generator)
            value.backward()  # type: ignore[no-untyped-call]
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                squares[name] += parameter.grad.square()
        count += 1
    for name, parameter in module.named_parameters():
        if name in squares:
            parameter.grad = (squares[name] / max(1, count)).sqrt()


def _estimator(criterion: str) -> Any:
    from torch_pruning.pruner import importance

    if criterion not in CRITERIA:
        raise UsageError(f"unknown criterion '{criterion}': expected one of {', '.join(CRITERIA)}.")
    known = {"magnitude": importance.GroupMagnitudeImportance, "taylor": importance.GroupTaylorImportance}
    return known[criterion]()


def _run(module: FlatModule, batch: Dataset, spec: Spec, device: str) -> dict[str, Tensor]:
    return by_name(module, spec, to_device(batch.inputs, device))


def _self_loss(outputs: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    parts = []
    for output in outputs.values():
        if not output.requires_grad:
            continue
        scores = output.float()
        if looks_like_logits(output):
            drawn = torch.multinomial(scores.detach().softmax(1), 1, generator=generator)[:, 0]
            parts.append(functional.cross_entropy(scores, drawn))
        else:
            noise = torch.randn(scores.shape, generator=generator, device=scores.device)
            parts.append((scores * noise).mean() / scores.detach().std(unbiased=False).clamp_min(1e-12))
    return torch.stack(parts).sum()


def _moved(labels: Any, device: str) -> Any:
    if isinstance(labels, dict):
        return {name: tensor.to(device) for name, tensor in labels.items()}
    return None if labels is None else labels.to(device)

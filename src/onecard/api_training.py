"""The Python face of training: :func:`qat` and :func:`prune`, whose programs :func:`onecard.optimize` tries as well."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from onecard.models.model import Model
    from onecard.training.prune_options import PruneOptions
    from onecard.training.prune_result import PruneResult
    from onecard.training.qat import QatOptions, QatResult


def qat(  # noqa: PLR0913 - keywords only
    model: str | nn.Module,
    train: str,
    output: str | Path,
    *,
    example_inputs: Any = None,
    inputs: str | Sequence[str] = (),
    weights: str | Path | None = None,
    data: str | None = None,
    options: QatOptions | None = None,
) -> QatResult:
    """Train a model while it computes as its INT8 self, and write it as a program for ``optimize(qat=...)``.

    Args:
        model: as for :func:`onecard.optimize`.
        train: rows to train on, ``.npz``, ``.safetensors`` or ``module:callable``; without labels the original teaches.
        output: the ``.pt2`` file to write.
        example_inputs: as for :func:`onecard.optimize`.
        inputs: the inputs as text.
        weights: a state dict for a model built by reference.
        data: rows to judge by; by default a tenth of ``train`` is put aside.
        options: see :class:`onecard.training.qat.QatOptions`; by default three epochs on the GPU, if there is one.

    Returns:
        The figures of fp32, of post-training quantisation and of the trained model.

    Raises:
        OnecardError: see :func:`onecard.training.qat.train_qat`.
    """
    from onecard.environment import resolve_device
    from onecard.training.data import load_training_data
    from onecard.training.loop import TrainOptions
    from onecard.training.qat import QatOptions, judged_rows, train_qat

    settled = options or QatOptions(TrainOptions(epochs=3, device=resolve_device("auto")))
    settled.check()
    loaded = _load(model, example_inputs, inputs, weights)
    judged = judged_rows(data, settled.metric, loaded.spec) if data else None
    return train_qat(loaded, load_training_data(train, loaded.spec), settled, output=Path(output), judged=judged)


def prune(  # noqa: PLR0913 - keywords only
    model: str | nn.Module,
    target: str,
    output: str | Path,
    *,
    train: str | None = None,
    example_inputs: Any = None,
    inputs: str | Sequence[str] = (),
    weights: str | Path | None = None,
    data: str | None = None,
    options: PruneOptions | None = None,
) -> PruneResult:
    """Remove channels of a model until a target is met, and write it as a program for ``optimize(pruned=...)``.

    Args:
        model: as for :func:`onecard.optimize`.
        target: ``flops=0.5``, ``params=0.4``, ``latency=3ms``, ``size=5MB`` ...
        output: the ``.pt2`` file to write.
        train: rows to fine-tune on; without them nothing is mended.
        example_inputs: as for :func:`onecard.optimize`.
        inputs: the inputs as text.
        weights: a state dict for a model built by reference.
        data: rows to judge by; by default the last tenth of ``train``.
        options: see :class:`onecard.training.prune_options.PruneOptions`; by default on the GPU, if there is one.

    Returns:
        Costs and figures before and after.

    Raises:
        OnecardError: see :func:`onecard.training.prune.prune`.
    """
    from onecard.environment import resolve_device
    from onecard.training.data import load_training_data
    from onecard.training.prune import prune as run
    from onecard.training.prune_options import PruneOptions
    from onecard.verify.data import load_data

    if options is None:
        defaults = PruneOptions()
        training = dataclasses.replace(defaults.training, device=resolve_device("auto"))
        options = dataclasses.replace(defaults, training=training)
    loaded = _load(model, example_inputs, inputs, weights)
    rows = load_training_data(train, loaded.spec) if train else None
    judged = load_data(data, loaded.spec) if data else None
    return run(loaded, target, options, output=Path(output), data=rows, judged=judged)


def _load(model: str | nn.Module, example: Any, inputs: str | Sequence[str], weights: str | Path | None) -> Model:
    from onecard.api import split_examples
    from onecard.models.load import load_model

    args, kwargs = split_examples(example)
    return load_model(
        model,
        inputs=(inputs,) if isinstance(inputs, str) else inputs,
        weights=Path(weights) if weights else None,
        example_args=args,
        example_kwargs=kwargs,
    )

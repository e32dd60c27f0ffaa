"""The Python face: :func:`optimize` makes a bundle, :func:`load` runs one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onecard.errors import BundleError, UsageError
from onecard.evidence import Evidence

if TYPE_CHECKING:
    from torch import nn

    from onecard.bundle.open import Bundle
    from onecard.models.model import Model, Origin
    from onecard.search.options import Observer, Options

_LONGEST = 120  # of what another bundle says of itself, in a message


def optimize(  # noqa: PLR0913 - the keywords are the interface
    model: str | nn.Module,
    example_inputs: Any = None,
    *,
    inputs: str | Sequence[str] = (),
    weights: str | Path | None = None,
    output: str | Path | None = None,
    data: str | None = None,
    calibration: str | None = None,
    pruned: str | Path | None = None,
    qat: str | Path | None = None,
    device: str = "auto",
    observe: Observer | None = None,
    **options: Any,
) -> Bundle:
    """Try every way to run a model on this machine, prove and measure each, and write the best as a bundle.

    Args:
        model: a module, or a reference such as ``torchvision:resnet50`` or ``file.py:callable``.
        example_inputs: one tensor, a tuple of positional arguments, or a dict of keyword arguments, to derive
            the inputs from; not needed with ``inputs`` or where the model says itself what it takes.
        inputs: the inputs as text: ``image: float32[B,3,224,224], B=1..64``.
        weights: a ``.safetensors`` or ``.pt`` state dict for a model built by reference.
        output: the bundle's folder; by default the model's name with ``.onecard`` in the current folder.
        data: labelled data: a file or ``module:callable``; with ``metric=`` it decides what counts as right.
        calibration: representative rows without labels for INT8 and FP8 scales, in the same forms; by default those
            of ``data``.
        pruned: a program that :func:`onecard.prune` wrote, tried beside the original and held to its answers.
        qat: likewise, one that :func:`onecard.qat` wrote.
        device: ``auto``, ``cpu``, ``cuda:0`` ...
        observe: called with a :class:`onecard.search.options.Progress` several times a second.
        **options: fields of :class:`onecard.search.options.Options` (objective, batches, recipes ...).

    Returns:
        The bundle, loaded back from its folder and self-tested.

    Raises:
        OnecardError: see :mod:`onecard.errors` for the tree.
    """
    args, kwargs = split_examples(example_inputs)
    prepared, search_options = prepare(
        model,
        device=device,
        inputs=inputs,
        weights=Path(weights) if weights else None,
        example_args=args,
        example_kwargs=kwargs,
        options=options,
    )
    alternatives = {name: Path(path) for name, path in (("pruned", pruned), ("qat", qat)) if path}
    out, _ = make_bundle(
        prepared,
        search_options,
        output=output,
        data=data,
        calibration=calibration,
        alternatives=alternatives,
        observe=observe,
    )
    return load(out, device=search_options.device)


def load(path: str | Path, device: str = "auto", *, device_memory: int | None = None) -> Bundle:
    """Open a bundle; see :func:`onecard.bundle.open.load_bundle` for what is checked and raised.

    Args:
        path: the bundle's folder.
        device: ``auto``, ``cpu``, ``cuda:0`` ...
        device_memory: most bytes of the device's memory that streamed weights may take.

    Returns:
        A callable: ``bundle(image=array)["output"]``.
    """
    from onecard.bundle.open import load_bundle

    return load_bundle(path, device, device_memory=device_memory)


def prepare(  # noqa: PLR0913 - keywords only
    reference: str | nn.Module,
    *,
    device: str,
    inputs: str | Sequence[str] = (),
    weights: Path | None = None,
    example_args: tuple[Any, ...] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[Model, Options]:
    """Load a model and settle the options of its search, in that order of cheapness: options first."""
    from onecard.environment import resolve_device
    from onecard.models.load import load_model
    from onecard.search.options import Options

    inputs = (inputs,) if isinstance(inputs, str) else inputs
    options = dict(options or {})
    if isinstance(options.get("recipes"), str):
        options["recipes"] = (options["recipes"],)
    known = set(Options.__dataclass_fields__) - {"device"}
    for name in options:
        if name not in known:
            raise UsageError(f"unknown option '{name}': expected one of {', '.join(sorted(known))}.")
    settled = Options(device=resolve_device(device), **options)
    model = load_model(
        reference, inputs=inputs, weights=weights, example_args=example_args, example_kwargs=example_kwargs
    )
    return model, settled


def make_bundle(  # noqa: PLR0913 - keywords only
    model: Model,
    options: Options,
    *,
    output: str | Path | None = None,
    data: str | None = None,
    calibration: str | None = None,
    alternatives: Mapping[str, Path] | None = None,
    observe: Callable[..., None] | None = None,
    command: str = "",
) -> tuple[Path, Evidence]:
    """Search and write the bundle; what the command line and :func:`optimize` share.

    Returns:
        The bundle's folder and all that was found.

    Raises:
        UsageError: a metric without what it needs, or no ``output`` where another model's bundle has the default name.
        OnecardError: see :mod:`onecard.errors` for the tree.
    """
    import msgspec

    from onecard.bundle.write import check_writable, explained_storage
    from onecard.host import cache_folder
    from onecard.publish import publish
    from onecard.search.material import load_material
    from onecard.search.search import Search
    from onecard.verify.data import load_data
    from onecard.verify.metrics import get_metric

    out = Path(output) if output else Path(f"{_slug(model.name)}.onecard")
    check_writable(out.absolute())
    if not output:
        _leave_others(out, model)
    if options.metric:
        get_metric(options.metric)
        if data is None:
            raise UsageError(f"--metric {options.metric} needs labelled data.", "Pass it with --data.")
    rows = load_data(data, model.spec) if data else None
    if options.metric and rows is not None and rows.labels is None:
        raise UsageError(f"--metric {options.metric} needs labels, and {data} holds none.", "Add an array 'label'.")
    material = load_material(model, calibration, alternatives or {})
    with explained_storage(cache_folder(), "Free some space or set ONECARD_CACHE to another folder."):
        search = Search(model, options, rows, observe, material)
        evidence = msgspec.structs.replace(search.run(), command=command)
    if not output:
        _leave_others(out, model)  # that came in the meantime; the search is kept, so the next one takes seconds
    return publish(out, evidence, search.folder), evidence


def split_examples(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments."""
    if example is None:
        return (), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example), {}) if isinstance(example, list | tuple) else ((example,), {})


def _leave_others(out: Path, model: Model) -> None:
    """Refuse a default name that another model's bundle has: nobody asked for that one to be replaced.

    Models are told apart by name, kind and reference, which hold no folders: the same file may be named by another path
    the next time. New weights or code under an old name are the same model, made anew. So is what cannot be read, for
    which optimising again is the cure.

    Raises:
        UsageError: such a bundle lies there.
    """
    from onecard.bundle.manifest import MANIFEST, SOURCE
    from onecard.models.source import read_source

    if not (out / MANIFEST).is_file():
        return
    try:
        there = read_source(out / SOURCE)
    except (BundleError, OSError):
        return
    old, new = there.origin, model.origin
    if (there.name, old.kind, old.reference) != (model.name, new.kind, new.reference):
        raise UsageError(
            f"{out.absolute()} is the bundle of another model: of {_origin(old)}, and this is {_origin(new)}.",
            "Name a folder with -o (output= in Python); one that is named is replaced.",
        )


def _origin(origin: Origin) -> str:
    return f"{origin.reference[:_LONGEST]!r} ({origin.kind[:_LONGEST]})"


def _slug(name: str) -> str:
    return re.sub(r"[^\w.\-]+", "-", name).strip("-.") or "model"

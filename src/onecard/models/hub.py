"""Models by name out of torchvision and timm; weights are random unless asked for."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from onecard.errors import MissingDependencyError, ModelError
from onecard.models.assemble import Derived, assemble
from onecard.models.flat import positional
from onecard.models.model import Model, Origin
from onecard.models.request import Request
from onecard.models.weights import load_strictly, read_checkpoint
from onecard.models.wording import first_line
from onecard.spec import Range, Spec, TensorSpec

_BATCH = Range(1, 8)
_SEGMENTATION_PIXELS = 520
_INCEPTION_PIXELS = 299
_PIXELS = 224


def load_torchvision(reference: str, request: Request) -> Model:
    """``NAME`` with random weights, ``NAME@DEFAULT`` (or another weights enum's name) with fetched ones.

    Raises:
        ModelError: no such model or weights.
        MissingDependencyError: torchvision is not installed.
    """
    name, _, tag = reference.partition("@")
    module = build_torchvision(name, tag or None)
    side = _torchvision_pixels(name, module)
    return _finish(name, module, Origin("torchvision", name), request, (3, side, side))


def load_timm(reference: str, request: Request) -> Model:
    """``NAME`` with random weights, ``NAME@pretrained`` with fetched ones.

    Raises:
        ModelError: no such model or weights.
        MissingDependencyError: timm is not installed.
    """
    name, _, tag = reference.partition("@")
    if tag not in ("", "pretrained"):
        raise ModelError(f"unknown weights '{tag}' of timm:{name}:", f"write timm:{name}@pretrained or timm:{name}.")
    module = build_timm(name, pretrained=bool(tag))
    import timm.data

    size = timm.data.resolve_model_data_config(module)["input_size"]  # [C, H, W]
    return _finish(name, module, Origin("timm", name), request, (int(size[0]), int(size[1]), int(size[2])))


def build_torchvision(name: str, weights: str | None = None) -> nn.Module:
    """Construct a torchvision model; without ``weights`` nothing is downloaded, not even a backbone.

    Raises:
        ModelError: no such model or weights.
        MissingDependencyError: torchvision is not installed.
    """
    try:
        from torchvision import models
    except ImportError as error:
        raise _missing("torchvision", name) from error
    names = models.list_models()
    if name not in names:
        raise unknown("torchvision", name, names)
    options: dict[str, Any] = {"weights": weights}
    known = inspect.signature(models.get_model_builder(name)).parameters
    if weights is None and "weights_backbone" in known:
        options["weights_backbone"] = None
    # These two draw random weights very slowly, and warn, unless told whether to.
    if weights is None and name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    try:
        module: nn.Module = models.get_model(name, **options)
    except Exception as error:  # enum look-ups, downloads, constructors: no common class
        raise _unbuilt("torchvision", name, weights, error) from error
    return module


def build_timm(name: str, *, pretrained: bool = False) -> nn.Module:
    """Construct a timm model.

    Raises:
        ModelError: no such model or weights.
        MissingDependencyError: timm is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise _missing("timm", name) from error
    if not timm.is_model(name.partition(".")[0]):
        raise unknown("timm", name, timm.list_models())
    try:
        module: nn.Module = timm.create_model(name, pretrained=pretrained)
    except Exception as error:  # downloads and constructors: no common class
        raise _unbuilt("timm", name, "pretrained" if pretrained else None, error) from error
    return module


def unknown(kind: str, name: str, names: Iterable[str]) -> ModelError:
    """An error that lists the names closest to a misspelt one."""
    near = difflib.get_close_matches(name, list(names), 3, 0.6)
    cure = f"Did you mean {', '.join(near)}?" if near else f"See {kind}'s list_models()."
    return ModelError(f"{kind} has no model '{name}'.", cure)


def _torchvision_pixels(name: str, module: nn.Module) -> int:
    if type(module).__module__.startswith("torchvision.models.segmentation"):
        return _SEGMENTATION_PIXELS
    return _INCEPTION_PIXELS if name.startswith("inception") else _PIXELS


def _finish(name: str, module: nn.Module, origin: Origin, request: Request, image: tuple[int, int, int]) -> Model:
    if request.weights is not None:
        load_strictly(module, read_checkpoint(request.weights), request.weights)

    def derive() -> Derived:
        spec = Spec((TensorSpec("image", "float32", ("B", *image)),), (), {"B": request.batch or _BATCH})
        return positional(("image",)), spec

    return assemble(name, module, origin, request, derive=derive)


def _missing(package: str, name: str) -> MissingDependencyError:
    return MissingDependencyError(f"{package}:{name} needs {package}.", "Install it: pip install 'onecard[vision]'.")


def _unbuilt(kind: str, name: str, weights: str | None, error: Exception) -> ModelError:
    what = f"with weights '{weights}' " if weights else ""
    return ModelError(
        f"{kind}:{name} could not be built {what}: {first_line(error)}.".replace("  ", " ").replace(" :", ":"),
        "Leave out '@...' and give --weights if the weights cannot be fetched here." if weights else "",
    )

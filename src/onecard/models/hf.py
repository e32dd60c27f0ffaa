"""Models of Hugging Face transformers: a directory, or an id that the library may fetch."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from onecard.errors import MissingDependencyError, ModelError
from onecard.models.assemble import Derived, assemble, parameters, with_notes
from onecard.models.flat import CallPlan
from onecard.models.model import Model, Origin
from onecard.models.request import Request
from onecard.models.weights import load_strictly, read_checkpoint
from onecard.models.wording import first_line
from onecard.quiet import TORCHAO, muted
from onecard.spec import Dim, Range, Spec, TensorSpec

_BATCH = Range(1, 8)
_LONGEST = 512
_PIXELS = 224
_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json", "pytorch_model.bin.index.json")
# Their position ids start behind the padding id, so that as many positions are never used.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "longformer", "mpnet", "xlm-roberta-xl", "data2vec-text")


def load(reference: str, request: Request) -> Model:
    """A directory with ``config.json`` (and weights, else they are random), or the id of a repository.

    Raises:
        ModelError: it cannot be found, or its class cannot be built.
        MissingDependencyError: transformers is not installed.
    """
    transformers = _transformers(reference)
    folder = Path(reference)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(f"the directory {reference} has no config.json.", "Save the model with save_pretrained().")
    notes: list[str] = []
    with _quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(reference)
        except Exception as error:  # files, JSON, network: no common class
            raise _not_found(reference, error) from error
        _configure(config)
        factory = model_class(config)
        if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _WEIGHT_FILES):
            module = build(config, factory)
            if request.weights is None:
                notes.append(f"{folder.name} has no weight file: the weights are random")
        else:
            module, missing = _pretrained(factory, reference, config)
            if missing:
                notes.append(f"the weights lack {len(missing)} tensors, which are random: {', '.join(missing[:3])}")
    if request.weights is not None:
        load_strictly(module, read_checkpoint(request.weights), request.weights)

    def derive() -> Derived | None:
        return derive_inputs(module, config, request.batch or _BATCH)

    name = folder.resolve().name if folder.is_dir() else reference.rpartition("/")[2]
    model = assemble(name, module, Origin("hf", type(module).__name__), request, derive=derive)
    return with_notes(model, notes)


def rebuild(reference: str, folder: Path) -> nn.Module:
    """Construct the class named ``reference`` from ``config.json`` in a source folder, weights random.

    Raises:
        ModelError: this transformers has no such class, or it does not take this config.
    """
    transformers = _transformers(reference)
    factory = getattr(transformers, reference, None)
    if factory is None:
        raise ModelError(
            f"transformers {transformers.__version__} has no class {reference}.",
            "Install the version it was made with.",
        )
    with _quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(folder / "config.json")
        except Exception as error:  # files and JSON: no common class
            raise _not_found(str(folder / "config.json"), error) from error
        _configure(config)
        return build(config, factory)


def build(config: Any, factory: Any) -> nn.Module:
    """Construct a model of a config, in fp32, with random weights.

    Raises:
        ModelError: the class does not take the config.
    """
    try:
        module: nn.Module = factory(config) if hasattr(factory, "config_class") else factory.from_config(config)
    except Exception as error:  # the constructor of any of hundreds of classes
        raise ModelError(f"{factory.__name__} cannot be built from its config: {first_line(error)}.") from error
    return module


def model_class(config: Any) -> Any:
    """The class that the config names under ``architectures``, or ``AutoModel``."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, nn.Module):
            return found
    return transformers.AutoModel


def derive_inputs(module: nn.Module, config: Any, batch: Range) -> Derived | None:
    """The inputs that a config and forward's signature tell: text, pictures, or both; None if neither."""
    known = parameters(module)
    tensors: list[TensorSpec] = []
    symbols = {"B": batch}
    if "input_ids" in known and (vocabulary := _setting(config, "vocab_size")):
        tensors += _text(known, config, int(vocabulary))
        symbols["S"] = Range(1, _positions(config))
        if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in known:
            tensors.append(TensorSpec("decoder_input_ids", "int64", ("B", "T"), Range(0, int(vocabulary) - 1)))
            symbols["T"] = symbols["S"]
    if "pixel_values" in known and (picture := _picture(config)):
        tensors.append(TensorSpec("pixel_values", "float32", ("B", *picture)))
    if not tensors:
        return None
    names = tuple(tensor.name for tensor in tensors)
    return CallPlan(names, (), {name: {"$": name} for name in names}), Spec(tuple(tensors), (), symbols)


def _text(known: tuple[str, ...], config: Any, vocabulary: int) -> list[TensorSpec]:
    shape: tuple[Dim, ...] = ("B", "S")
    tensors = [TensorSpec("input_ids", "int64", shape, Range(0, vocabulary - 1))]
    if "attention_mask" in known:
        tensors.append(TensorSpec("attention_mask", "int64", shape, Range(0, 1)))
    types = int(_setting(config, "type_vocab_size") or 0)
    if "token_type_ids" in known and types > 1:
        tensors.append(TensorSpec("token_type_ids", "int64", shape, Range(0, types - 1)))
    return tensors


def _positions(config: Any) -> int:
    longest = int(_setting(config, "max_position_embeddings") or _setting(config, "n_positions") or _LONGEST)
    if getattr(config, "model_type", "") in _OFFSET_POSITIONS:
        longest -= int(getattr(config, "pad_token_id", None) or 0) + 1
    return max(1, min(longest, _LONGEST))


def _picture(config: Any) -> tuple[int, int, int] | None:
    side = _setting(config, "image_size") or _PIXELS
    height, width = side if isinstance(side, list | tuple) else (side, side)
    return int(_setting(config, "num_channels") or 3), int(height), int(width)


def _setting(config: Any, name: str) -> Any:
    """A setting of the config, or of its text or vision part."""
    for part in (config, getattr(config, "text_config", None), getattr(config, "vision_config", None)):
        value = getattr(part, name, None)
        if value is not None:
            return value
    return None


def _configure(config: Any) -> None:
    # A cache of keys and values is no tensor of the answer, and return_dict=False would lose the names.
    for name, value in (("use_cache", False), ("return_dict", True)):
        if hasattr(config, name):
            setattr(config, name, value)


def _pretrained(factory: Any, reference: str, config: Any) -> tuple[nn.Module, list[str]]:
    try:
        module, info = factory.from_pretrained(
            reference, config=config, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:  # files, formats, network: no common class
        raise _not_found(reference, error) from error
    return module, sorted(info.get("missing_keys", ()))


def _transformers(reference: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            f"hf:{reference} needs transformers.", "Install it: pip install 'onecard[hf]'."
        ) from error
    return transformers


def _not_found(reference: str, error: Exception) -> ModelError:
    return ModelError(
        f"transformers cannot load '{reference}': {first_line(error)}.",
        "Give a directory made by save_pretrained(), or an id that can be fetched from here.",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' loading report and bar away; what matters of it becomes a note.

    Where torchao is installed transformers imports it, and it reports every kernel made for another card.
    """
    with muted(*TORCHAO):
        from transformers.utils import logging as reports

        level, bar = reports.get_verbosity(), reports.is_progress_bar_enabled()
        reports.set_verbosity(logging.ERROR)
        reports.disable_progress_bar()
        try:
            yield
        finally:
            reports.set_verbosity(level)
            if bar:
                reports.enable_progress_bar()

"""Which recipes are worth trying for a model on a device."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from onecard.backends import BACKENDS, plugins
from onecard.environment import Environment
from onecard.errors import UsageError
from onecard.models.model import Model
from onecard.recipe import ORIGINAL, Recipe

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_TF32_SINCE = 8.0  # compute capability: Ampere
_BF16_SINCE = 8.0  # Ampere; older cards emulate it slowly, and not in every operator
_FP8_SINCE = 8.9  # Ada Lovelace, Hopper
_SPARSE_SINCE = 8.0  # Ampere
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


MODES = {
    "eager": ("",),
    "torchscript": ("trace", "script"),
    "inductor": ("",),
    "aoti": ("",),
    "cudagraph": ("eager", "inductor", "torchscript"),
    "onnxruntime": ("cpu", "cuda", "tensorrt"),
    "openvino": ("", "bf16", "fp16"),
    "tensorrt": ("",),
    "stream": ("",),
}
"""The modes of each backend; empty where it has none, or a default."""


@dataclass(frozen=True)
class Traits:
    """What decides which recipes apply: layers of the model, symbols of the spec, abilities of the card.

    ``rows`` tells that there is data, without which nobody could say what a compression costs; ``alternatives``
    are the names of the programs that may take the original's place; ``limited`` that the device's memory is.
    """

    convs: bool
    norms: bool
    symbols: bool
    onnx: bool
    cuda: bool
    tf32: bool
    cpu_bf16: bool
    linears: bool = False
    bf16: bool = False
    fp8: bool = False
    sparse: bool = False
    rows: bool = False
    limited: bool = False
    alternatives: tuple[str, ...] = ()


def traits_of(
    model: Model,
    environment: Environment,
    rows: bool = False,
    alternatives: tuple[str, ...] = (),
    limited: bool = False,
) -> Traits:
    """Look at a model and a machine, and at what the user gave beside them."""
    layers = list(model.flat.inner.modules())
    card = environment.card
    capability = float(card.compute_capability) if card else 0.0
    return Traits(
        convs=any(isinstance(m, _CONVS) for m in layers),
        norms=any(isinstance(m, _NORMS) for m in layers),
        symbols=any(r.low < r.high for r in model.spec.symbols.values()),
        onnx=model.origin.kind == "onnx",
        cuda=card is not None,
        tf32=capability >= _TF32_SINCE,
        cpu_bf16=not _BF16_FLAGS.isdisjoint(environment.cpu_flags),
        linears=any(isinstance(m, nn.Linear) for m in layers),
        bf16=capability >= _BF16_SINCE,
        fp8=capability >= _FP8_SINCE,
        sparse=capability >= _SPARSE_SINCE,
        rows=rows,
        alternatives=alternatives,
        limited=limited,
    )


def default_recipes(traits: Traits) -> list[Recipe]:
    """The recipes for these traits: the original first, then those that promise most for their time."""
    if traits.onnx:
        recipes = _onnx_recipes(traits)
    elif traits.cuda:
        recipes = _cuda_recipes(traits)
    else:
        recipes = _cpu_recipes(traits)
    if not traits.onnx:
        recipes += (_cuda_compressed if traits.cuda else _cpu_compressed)(traits)
    elif traits.rows and not traits.cuda:
        recipes += [Recipe("onnxruntime", "cpu", ("int8",)), Recipe("openvino", "", ("int8",))]
    if traits.limited and not traits.onnx:
        halves = (("fp16", "bf16") if traits.bf16 else ("fp16",)) if traits.cuda else ()
        recipes += [Recipe("stream", "", (half,)) for half in halves]
        recipes.append(Recipe("stream"))
    recipes += [Recipe(name) for name in plugins()]
    return list(dict.fromkeys([ORIGINAL, *recipes]))


def select_recipes(traits: Traits, patterns: Sequence[str]) -> list[Recipe]:
    """The recipes that match any of the globs, and always the original.

    Args:
        traits: of the model and the machine.
        patterns: globs over recipe ids, or whole ids in their text form; none means the default list.

    Raises:
        UsageError: a pattern matches nothing and is no recipe itself.
    """
    offered = default_recipes(traits)
    if not patterns:
        return offered
    chosen = [ORIGINAL]
    for pattern in patterns:
        matches = [r for r in offered if fnmatch.fnmatchcase(r.id, pattern)]
        if not matches:
            matches = [parse_recipe(pattern, [r.id for r in offered])]
        chosen += matches
    return list(dict.fromkeys(chosen))


def parse_recipe(text: str, offered: Sequence[str] = ()) -> Recipe:
    """Read a recipe's id: ``backend[.mode][+transform...][@bucket]``.

    Raises:
        UsageError: an unknown backend or transform; the message lists the recipes on offer.
    """
    from onecard.transforms import COMPRESSORS, TRANSFORMS

    body, _, suffix = text.partition("@")
    head, *transforms = body.split("+")
    backend, _, mode = head.partition(".")
    known = {*BACKENDS, *plugins()}
    unknown = [t for t in transforms if t not in TRANSFORMS and t not in COMPRESSORS]
    wrong_mode = backend in MODES and mode not in MODES[backend]
    if backend not in known or unknown or wrong_mode or suffix not in ("", "bucket"):
        raise UsageError(
            f"no recipe matches '{text}'.",
            f"On offer here: {', '.join(offered)}. A recipe of your own is BACKEND[.MODE][+TRANSFORM...][@bucket] "
            f"with backends {', '.join(sorted(known))} (modes: {_modes_text()}) "
            f"and transforms {', '.join((*TRANSFORMS, *COMPRESSORS))}.",
        )
    return Recipe(backend, mode, tuple(transforms), suffix == "bucket")


def _modes_text() -> str:
    return "; ".join(f"{name} {'|'.join(filter(None, modes))}" for name, modes in MODES.items() if any(modes))


def _cpu_recipes(traits: Traits) -> list[Recipe]:
    fold = ("fold_bn",) if traits.norms else ()
    layout = ("channels_last",) if traits.convs else ()
    recipes = [
        Recipe("onnxruntime", "cpu"),
        Recipe("openvino"),
        Recipe("torchscript", "trace"),
        Recipe("inductor", static=True),
        Recipe("torchscript", "trace", (*layout, *fold)),
        Recipe("eager", "", (*layout, *fold)),
        Recipe("torchscript", "script"),
    ]
    if fold:
        recipes += [Recipe("eager", "", fold), Recipe("eager", "", (*layout, *fold, "fuse_activation"))]
    if traits.linears and not traits.convs:
        recipes.append(Recipe("eager", "", ("fuse_qkv",)))
    if traits.cpu_bf16:
        recipes += [
            Recipe("openvino", "bf16"),
            Recipe("inductor", "", ("bf16",), static=True),
            Recipe("eager", "", (*layout, *fold, "bf16")),
            Recipe("eager", "", ("autocast_bf16",)),
        ]
    if traits.symbols:  # fixed shapes let an engine plan its memory, moving ones need one artifact only
        recipes += [
            Recipe("inductor"),
            Recipe("openvino", static=True),
            Recipe("onnxruntime", "cpu", static=True),
        ]
    recipes.append(Recipe("aoti"))
    return recipes


def _cuda_recipes(traits: Traits) -> list[Recipe]:
    fold = ("fold_bn",) if traits.norms else ()
    layout = ("channels_last",) if traits.convs else ()
    half = (*layout, *fold, "fp16")
    recipes = [
        Recipe("eager", "", half),
        Recipe("cudagraph", "inductor", half, static=True),
        Recipe("inductor", "", half, static=True),
        Recipe("cudagraph", "eager", half, static=True),
        Recipe("torchscript", "trace", half),
        *([Recipe("cudagraph", "inductor", (*layout, *fold, "bf16"), static=True)] if traits.bf16 else []),
        Recipe("eager", "", ("autocast_fp16",)),
        Recipe("onnxruntime", "cuda", ("fp16",)),
        Recipe("onnxruntime", "tensorrt", ("fp16",)),
        Recipe("tensorrt", "", ("fp16",)),
        Recipe("aoti", "", half),
    ]
    if fold:
        recipes.append(Recipe("cudagraph", "eager", (*layout, *fold, "fuse_activation", "fp16"), static=True))
    if traits.linears and not traits.convs:
        recipes.append(Recipe("cudagraph", "inductor", ("fuse_qkv", "fp16"), static=True))
    if traits.tf32:
        recipes += [
            Recipe("eager", "", ("tf32",)),
            Recipe("cudagraph", "inductor", (*layout, *fold, "tf32"), static=True),
        ]
    return recipes


def _onnx_recipes(traits: Traits) -> list[Recipe]:
    cpu = [Recipe("onnxruntime", "cpu"), Recipe("openvino"), *([Recipe("openvino", "bf16")] if traits.cpu_bf16 else [])]
    cuda = [Recipe("onnxruntime", "cuda"), Recipe("onnxruntime", "tensorrt")]
    return cuda if traits.cuda else cpu


def _cpu_compressed(traits: Traits) -> list[Recipe]:
    """INT8 in each engine's own way, and whatever was trained beside the original."""
    fold = ("fold_bn",) if traits.norms else ()
    recipes: list[Recipe] = []
    if traits.rows:
        recipes += [
            Recipe("onnxruntime", "cpu", (*fold, "int8")),
            Recipe("openvino", "", (*fold, "int8")),
            Recipe("inductor", "", (*fold, "int8"), static=True),
        ]
    if traits.rows and traits.linears and not traits.convs:  # in a convolutional net the linears hardly matter
        recipes += [
            Recipe("onnxruntime", "cpu", ("int8_dynamic",)),
            Recipe("inductor", "", ("int8_dynamic",), static=True),
            Recipe("openvino", "", ("int8_weights",)),
        ]
    for name in traits.alternatives:
        recipes += [
            Recipe("onnxruntime", "cpu", (name,)),
            Recipe("openvino", "", (name,)),
            Recipe("inductor", "", (name,), static=True),
        ]
    if "pruned" in traits.alternatives:
        recipes.append(Recipe("eager", "", ("pruned",)))
        if traits.rows:
            recipes += [
                Recipe("onnxruntime", "cpu", ("pruned", "int8")),
                Recipe("openvino", "", ("pruned", "int8")),
            ]
    return recipes


def _cuda_compressed(traits: Traits) -> list[Recipe]:
    """Eight bits on tensor cores; on Hopper and Ada that means FP8."""
    fold = ("fold_bn",) if traits.norms else ()
    layout = ("channels_last",) if traits.convs else ()
    half = (*layout, *fold, "fp16")
    schemes: list[str] = []
    if traits.rows:
        schemes += ["fp8", "fp8_static"] if traits.fp8 else ["int8_dynamic", "int8"]
        schemes += ["sparse24"] if traits.sparse else []
    recipes = [Recipe("cudagraph", "inductor", (*half, scheme), static=True) for scheme in schemes]
    for name in traits.alternatives:
        recipes.append(Recipe("cudagraph", "inductor", (name, *half[len(layout) + len(fold) :]), static=True))
    return recipes

"""The ``source/`` folder of a job and of a bundle: the original, so that another process can have it again.

``source.json`` says what it is; beside it stand, by kind, ``weights.safetensors`` with what builds the module
(``factory.py``, ``config.json``), or the model as one file (``model.ts``, ``model.onnx``, ``model.pt2``).
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path
from types import ModuleType

import msgspec
from torch import nn

from onecard.errors import BundleError, ModelError, Unsupported
from onecard.models.assemble import make_still
from onecard.models.exported import export_flat, flat_program, load_exported, save_exported
from onecard.models.flat import CallPlan, FlatModule, positional
from onecard.models.model import Model, Origin
from onecard.models.weights import load_state, save_state
from onecard.models.wording import first_line
from onecard.spec import Spec

FORMAT = 1
_JSON_CAP_BYTES = 16 << 20
_KEPT_FILES = {"factory": "factory.py", "torchscript": "model.ts", "onnx": "model.onnx"}


class Source(msgspec.Struct, frozen=True):
    """What ``source.json`` holds.

    Args:
        format: of this file; a newer one is refused.
        name: what the user sees.
        origin: how the module is built.
        plan: how it is called.
        spec: inputs, outputs and symbols.
        files: the files beside it.
        aliases: names of the state that are the same tensor as another.
        program_spec: what ``model.pt2`` serves, where that is less than ``spec``.
    """

    format: int
    name: str
    origin: Origin
    plan: CallPlan
    spec: Spec
    files: tuple[str, ...] = ()
    aliases: dict[str, str] = {}
    program_spec: Spec | None = None


def save_source(model: Model, folder: Path, *, live: bool = False) -> list[str]:
    """Write the original into a folder.

    Args:
        model: what :func:`onecard.models.load.load_model` gave.
        folder: is created; files of the same names are replaced.
        live: also write ``live.pkl`` for a live module. Only for a private folder: it is a pickle.

    Returns:
        Notes on what could not be kept, for the report.

    Raises:
        ModelError: the weights hold something that is no tensor.
    """
    folder.mkdir(parents=True, exist_ok=True)
    notes: list[str] = []
    aliases: dict[str, str] = {}
    program_spec: Spec | None = None
    kind = model.origin.kind
    kept = _KEPT_FILES.get(kind, "")
    if kept and kept in model.files:
        (_copy_onnx if kind == "onnx" else shutil.copyfile)(model.files[kept], folder / kept)
    if model.origin.is_rebuildable:
        aliases = save_state(model.flat.inner, folder / "weights.safetensors")
        if kind == "hf":
            (folder / "config.json").write_text(model.flat.inner.config.to_json_string(use_diff=False))  # type: ignore[union-attr, operator]
    elif kind in ("live", "exported"):
        program_spec, notes = _save_program(model, folder / "model.pt2")
        if live and kind == "live":
            notes += _save_live(model.flat.inner, folder / "live.pkl")
    files = tuple(sorted(p.name for p in folder.iterdir() if p.is_file() and p.name != "source.json"))
    source = Source(FORMAT, model.name, model.origin, model.flat.plan, model.spec, files, aliases, program_spec)
    (folder / "source.json").write_bytes(msgspec.json.format(msgspec.json.encode(source), indent=1))
    return notes


def _copy_onnx(path: Path, target: Path) -> None:
    """Copy an ONNX file; weights that lie in files beside it move into it, up to protobuf's 2 GiB."""
    import onnx
    from onnx.external_data_helper import uses_external_data

    graph = onnx.load(path, load_external_data=False).graph
    if not any(uses_external_data(tensor) for tensor in graph.initializer):
        shutil.copyfile(path, target)
        return
    try:
        onnx.save(onnx.load(path), target)
    except (ValueError, OSError) as error:
        raise ModelError(
            f"the weights beside {path} cannot be taken along: {first_line(error)}.",
            "Save the model in one file (at most 2 GiB), or give the PyTorch model itself.",
        ) from error


def load_source(folder: Path, *, allow_live: bool = False) -> Model:
    """Make the original again from a folder that :func:`save_source` wrote.

    Building a ``factory`` runs its code, so the folder must be as trusted as the model itself was.

    Args:
        folder: the source folder.
        allow_live: use ``live.pkl`` if it is there. It is a pickle: only for a folder this user just wrote.

    Returns:
        A model that gives bit for bit the same answers.

    Raises:
        BundleError: the folder is damaged, changed or made by a newer onecard.
        ModelError: what builds the module is not installed here, or the model was never exportable.
    """
    source = read_source(folder)
    plan, spec = source.plan, source.spec
    if source.origin.kind == "live" and allow_live and (folder / "live.pkl").is_file():
        module = _load_live(folder / "live.pkl")
    elif source.origin.kind in ("live", "exported"):
        plan, spec = positional(source.plan.inputs), source.program_spec or source.spec
        plan = msgspec.structs.replace(plan, outputs=source.plan.outputs)
        module = _load_program(folder / "model.pt2", source.name)
    else:
        module = _rebuild(source, folder)
    if source.origin.is_rebuildable:
        module = make_still(module)
        load_state(module, folder / "weights.safetensors", source.aliases)
    files = {name: folder / name for name in source.files if name in _KEPT_FILES.values()}
    return Model(source.name, FlatModule(make_still(module), plan).eval(), spec, source.origin, files)


def read_source(folder: Path) -> Source:
    """Read ``source.json``.

    Raises:
        BundleError: it is missing, too large, malformed or of a newer format.
    """
    path = folder / "source.json"
    if not path.is_file():
        raise BundleError(f"{folder} is no source folder: source.json is missing.", "Optimise the model again.")
    if path.stat().st_size > _JSON_CAP_BYTES:
        raise BundleError(f"{path} has more than {_JSON_CAP_BYTES} bytes.", "Do not use it: it was tampered with.")
    try:
        source = msgspec.json.decode(path.read_bytes(), type=Source)
    except msgspec.MsgspecError as error:
        raise BundleError(f"{path} is malformed: {error}.", "Get the bundle again from where it was made.") from error
    if source.format > FORMAT:
        raise BundleError(f"{path} has format {source.format}, newer than {FORMAT}.", "Upgrade onecard.")
    return source


def _rebuild(source: Source, folder: Path) -> nn.Module:
    from onecard.models import factory, files, hf, hub
    from onecard.models.onnx_module import OnnxModule

    kind, reference = source.origin.kind, source.origin.reference
    if kind == "torchvision":
        return hub.build_torchvision(reference)
    if kind == "timm":
        return hub.build_timm(reference)
    if kind == "hf":
        return hf.rebuild(reference, folder)
    if kind == "torchscript":
        return files.open_torchscript(files.existing(str(folder / "model.ts")))
    if kind == "onnx":
        return OnnxModule(files.existing(str(folder / "model.onnx")))
    if kind != "factory":
        raise BundleError(f"the source is of the unknown kind '{kind}'.", "Upgrade onecard.")
    place, _, name = reference.rpartition(":")
    if source.origin.module_sha256:
        place = str(_checked(folder / "factory.py", source.origin.module_sha256))
    return factory.call_factory(factory.import_place(place), name, reference)


def _checked(path: Path, digest: str) -> Path:
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise BundleError(f"{path} is missing or was changed.", "Get the bundle again from where it was made.")
    return path


def _save_program(model: Model, path: Path) -> tuple[Spec | None, list[str]]:
    try:
        program, spec, notes = export_flat(model.flat, model.spec)
        save_exported(program, path)
    except Unsupported as error:
        return None, [f"the original could not be exported, so it cannot be made again from the bundle: {error.detail}"]
    return (None if spec == model.spec else spec), notes


def _load_program(path: Path, name: str) -> nn.Module:
    if not path.is_file():
        raise ModelError(
            f"the original of '{name}' was given as a live module and could not be exported.",
            "Give it as path/file.py:callable, and it can be built again anywhere.",
        )
    return flat_program(load_exported(path))


def _save_live(module: nn.Module, path: Path) -> list[str]:
    import cloudpickle

    foreign = _unimportable(module)
    for code in foreign:
        cloudpickle.register_pickle_by_value(code)
    try:
        path.write_bytes(cloudpickle.dumps(module))
    except Exception as error:  # any attribute of the user's module may refuse
        path.unlink(missing_ok=True)
        return [f"the live module could not be handed to a worker ({type(error).__name__}); its export is used"]
    finally:
        for code in foreign:
            cloudpickle.unregister_pickle_by_value(code)
    return []


def _unimportable(module: nn.Module) -> list[ModuleType]:
    """Python modules of the submodules' classes that another process could not import by name.

    ``__main__`` is not among them: cloudpickle takes it by value by itself.
    """
    names = {type(part).__module__ for part in module.modules()} - {"__main__"}
    return [
        sys.modules[name]
        for name in sorted(names & set(sys.modules))
        if not any(finder.find_spec(name.partition(".")[0], None) for finder in sys.meta_path)
    ]


def _load_live(path: Path) -> nn.Module:
    import cloudpickle

    try:
        module = cloudpickle.loads(path.read_bytes())
    except Exception as error:  # whatever the user's classes raise
        raise ModelError(
            f"the live module cannot be made again in a worker: {type(error).__name__}: {error}.",
            "Define its class in an importable module, or give the model as path/file.py:callable.",
        ) from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"{path} holds a {type(module).__name__}, expected a torch.nn.Module.")
    return module

"""A search's key: a digest of everything that its results depend on, the same in another process and folder."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import torch

from onecard.environment import fingerprint
from onecard.models.model import Model
from onecard.search.content import Content, is_users
from onecard.search.job import Job
from onecard.verify.metrics import get_metric

_LARGEST_FILE = 4 << 20  # of a user's code; a larger one is an extension, and told by its size
_CHUNK = 1 << 20


def job_key(model: Model, job: Job, data_digest: str) -> str:
    """A digest of everything that the results depend on: weights, code, spec, versions, card, onecard itself.

    Never the name: two models of one name are two jobs.

    Args:
        model: the original.
        job: what is asked of every candidate.
        data_digest: of the rows and programs beside the model.

    Returns:
        24 hexadecimal digits.
    """
    content = Content()
    if model.origin.kind != "torchscript":  # its file says it all
        _add_model(content, model.flat.inner)
    for path in _model_files(model):
        content.add(_file_digest(path))
    if job.metric:
        content.add_value(get_metric(job.metric))
    for name, digest in _users_files():
        content.add(name, digest)
    asked = {name: getattr(job, name) for name in job.__struct_fields__ if name != "environment"}
    parts = [model.flat.plan, model.origin, asked, fingerprint(job.environment)]
    content.add(msgspec.json.encode(parts, order="sorted"), data_digest)
    for path in sorted(Path(__file__).parent.parent.rglob("*.py")):
        content.add(path.read_bytes())
    return content.hexdigest()[:24]


def _add_model(content: Content, inner: torch.nn.Module) -> None:
    """The module's tree, and the state that is no parameter or buffer of it: packed weights, extra state."""
    content.add_value(inner)
    held = {_address(tensor) for tensor in (*inner.parameters(), *inner.buffers())}
    for name, value in inner.state_dict().items():
        if not isinstance(value, torch.Tensor) or _address(value) not in held:
            content.add(name)
            content.add_value(value)


def _address(tensor: torch.Tensor) -> int:
    with contextlib.suppress(RuntimeError, NotImplementedError):  # sparse ones have several, or none
        return tensor.data_ptr()
    return -1


def _model_files(model: Model) -> list[Path]:
    """The files that rebuilding needs, and those in which an ONNX file keeps its weights."""
    files = [Path(path) for _, path in sorted(model.files.items())]
    if model.origin.kind == "onnx":
        import onnx
        from onnx.external_data_helper import ExternalDataInfo, uses_external_data

        for path in list(files):
            tensors = onnx.load(path, load_external_data=False).graph.initializer
            beside = {ExternalDataInfo(tensor).location for tensor in tensors if uses_external_data(tensor)}
            files += [path.parent / name for name in sorted(beside) if (path.parent / name).is_file()]
    return files


def _users_files() -> list[tuple[str, bytes]]:
    """The files of all imported modules that are the user's own: helpers, base classes, a metric.

    By name and content, without their folders: a copy of a project is the same project.
    """
    return sorted({(path.name, _file_digest(path, _LARGEST_FILE)) for path in _imported_files()})


def _imported_files() -> Iterator[Path]:
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or not is_users(name):
            continue
        path = Path(file)
        is_tool = name == "__main__" and path.suffix != ".py"  # the script of `onecard` itself, or of pytest
        if not is_tool and path.is_file():
            yield path


def _file_digest(path: Path, largest: int | None = None) -> bytes:
    size = path.stat().st_size
    if largest is not None and size > largest:
        return str(size).encode()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.digest()

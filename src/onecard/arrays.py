"""Files of named arrays: ``.npz`` and ``.safetensors``, never pickles."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from onecard.errors import DataError, StorageError, UsageError

Arrays = dict[str, npt.NDArray[np.generic]]
_SUFFIXES = (".npz", ".safetensors")
_TOP = 5


def read_arrays(path: Path) -> Arrays:
    """Read a file of named arrays.

    Raises:
        DataError: missing, of another kind, damaged, or with Python objects inside.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path}.", "Pass an .npz or .safetensors file.")
    if path.suffix not in _SUFFIXES:
        raise DataError(f"{path} is neither .npz nor .safetensors.", "Save the arrays by input name with numpy.savez.")
    try:
        if path.suffix == ".safetensors":
            return _plain(dict(load_file(path)), path)
        if not zipfile.is_zipfile(path):  # NumPy would take it for a pickle, and say so
            raise DataError(
                f"{path} cannot be read: it is no .npz file, or a damaged one.",
                "Save the arrays by input name with numpy.savez.",
            )
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (SafetensorError, ValueError, zipfile.BadZipFile, OSError, EOFError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error}.", "Save the arrays again with numpy.savez.") from error


def _plain(arrays: Arrays, path: Path) -> Arrays:
    """Refuse the dtypes that NumPy itself lacks, whether or not a package has taught them to it."""
    for name, array in arrays.items():
        if array.dtype.kind == "V":
            raise DataError(f"{path}: array '{name}' is {array.dtype}, which NumPy lacks.", "Save it as float32.")
    return arrays


def check_output(path: Path) -> None:
    """Refuse an output that could not be written, before the work is done.

    Raises:
        UsageError: its suffix is neither ``.npz`` nor ``.safetensors``.
        StorageError: its folder does not exist.
    """
    if path.suffix not in _SUFFIXES:
        raise UsageError(f"{path} is neither .npz nor .safetensors.", "Choose one of these suffixes for -o.")
    if not path.absolute().parent.is_dir():
        raise StorageError(f"there is no folder {path.absolute().parent}.", "Make it first.")


def write_arrays(path: Path, arrays: Mapping[str, npt.NDArray[np.generic]]) -> None:
    """Write named arrays, whole or not at all.

    Raises:
        StorageError: the place cannot be written.
    """
    aside = path.with_name(f".{path.name}{path.suffix}")
    try:
        if path.suffix == ".safetensors":
            # safetensors writes the memory as it lies, so a view must be laid out in order first.
            save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, aside)
        else:
            np.savez(aside, **arrays)  # type: ignore[arg-type]
        aside.replace(path)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise StorageError(f"{path} cannot be written: {error}.", "Choose another place with -o.") from error


def describe_arrays(arrays: Mapping[str, npt.NDArray[np.generic]]) -> Iterator[str]:
    """One line an array: name, dtype, shape, and its largest or first elements."""
    for name, array in arrays.items():
        yield f"{name}: {array.dtype}{list(array.shape)}  {_glance(array)}"


def _glance(array: npt.NDArray[np.generic]) -> str:
    if array.ndim == 2 and array.shape[1] > _TOP and array.dtype.kind == "f":  # noqa: PLR2004 - [rows, classes]
        order = np.argsort(-array[0].astype(np.float64))[:_TOP]
        return "largest of row 0: " + ", ".join(f"{i} ({float(array[0, i]):.4g})" for i in order)
    return "begins " + ", ".join(f"{v:.4g}" if array.dtype.kind == "f" else str(v) for v in array.reshape(-1)[:_TOP])

"""Reading files of weights without running anything that they contain, and writing them whole."""

import os
import pickle
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from jigsaw_d2.errors import JigsawError

_ARRAY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
# How our unpickler words a refusal, and how torch's does.
_REFUSALS = ("it holds", "bytes spelled in", "Unsupported global", "Unsupported class")
# What unpicklers raise over bytes that are no pickle, or half of one.
_DAMAGES = (
    *(EOFError, RuntimeError, zipfile.BadZipFile, ValueError, KeyError, OSError),
    *(AttributeError, ImportError, IndexError, TypeError),
)
_NUMERIC_MODULES = ("numpy.core.numeric", "numpy._core.numeric")


class WeightFileError(JigsawError, ValueError):
    """A file that is missing, truncated, of another kind, or in the way."""


def _latin1_bytes(text: str, encoding: str = "latin1") -> bytes:
    """Stands for ``codecs.encode``, which pickles of protocol 2 call to spell bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"{_REFUSALS[1]} {encoding!r}")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numbers, text, containers and numpy arrays; refuses every other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _latin1_bytes
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if module in _ARRAY_MODULES and name in ("_reconstruct", "scalar"):
            return getattr(np._core.multiarray, name)
        if module in _NUMERIC_MODULES and name == "_frombuffer":
            return np._core.numeric._frombuffer
        raise pickle.UnpicklingError(f"{_REFUSALS[0]} {module}.{name}")


def read_weights(path: str | Path, trust: bool = False) -> Any:
    """The object in a ``.pkl`` (numpy arrays) or a torch file (any other name, tensors on the CPU).

    Args:
        trust: unpickle anything, which may run code from the file. Only for files of your own.

    Raises:
        WeightFileError: no such file; or neither of the two kinds; or it holds more than tensors,
            arrays and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightFileError(f"{path}: no such file")
    try:
        if path.suffix == ".pkl":
            return _read_pickle(path, trust)
        return torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        reason = _reason(str(error))
        if any(sign in str(error) for sign in _REFUSALS):
            raise WeightFileError(
                f"{path}: refused, because reading it could run code from it ({reason}); expected "
                "tensors or arrays and plain values only. If the file is your own, --trust reads it"
            ) from None
        raise WeightFileError(_damaged(path, reason)) from None
    except _DAMAGES as error:
        reason = _reason(str(error)) or f"it ends too early, {type(error).__name__}"
        raise WeightFileError(_damaged(path, reason)) from None


def _read_pickle(path: Path, trust: bool) -> Any:
    unpickler = pickle.Unpickler if trust else _ArrayUnpickler
    with open(path, "rb") as stream:
        return unpickler(stream, encoding="latin1").load()


def _reason(text: str) -> str:
    """First sentence of what matters in an error of torch's or pickle's, often a page long."""
    text = text.rpartition("WeightsUnpickler error:")[2].strip()
    return text.splitlines()[0].split(". ")[0][:160] if text else ""


def _damaged(path: Path, reason: str) -> str:
    kind = "pickle of numpy arrays" if path.suffix == ".pkl" else "file of torch.save"
    return (
        f"{path} ({path.stat().st_size} bytes): expected a whole {kind}, but it cannot be read "
        f"({reason}); is it truncated, or another kind of file?"
    )


def write_atomically(path: str | Path, write: Callable[[BinaryIO], None], force: bool) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it.

    Raises:
        WeightFileError: ``path`` exists and ``force`` is False.
    """
    path = Path(path)
    check_free(path, force)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are for their owner alone
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_free(path: Path, force: bool) -> None:
    """Raise ``WeightFileError`` if ``path`` exists and must not be replaced."""
    if path.exists() and not force:
        raise WeightFileError(f"{path} exists; --force replaces it")


def write_text(path: str | Path, text: str, force: bool) -> None:
    """``write_atomically`` for text, in UTF-8."""

    def write(stream: BinaryIO) -> None:
        stream.write(text.encode())

    write_atomically(path, write, force)


def write_object(path: str | Path, value: Mapping[str, Any], force: bool) -> None:
    """``write_atomically`` for a dict: pickled if named ``.pkl``, else with ``torch.save``."""

    def write(stream: BinaryIO) -> None:
        if Path(path).suffix == ".pkl":
            pickle.dump(value, stream, protocol=4)
        else:
            torch.save(value, stream)

    write_atomically(path, write, force)

"""What lies in a file of weights, read without running code from it."""

import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jigsaw_d2.io import CheckpointError

Arrays = dict[str, np.ndarray]
_PICKLED = {
    ("_codecs", "encode"): str.encode,  # pickles of protocol 2 call it to spell bytes
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
    ("multiarray", "scalar"): np._core.multiarray.scalar,
    ("numeric", "_frombuffer"): np._core.numeric._frombuffer,
}
# How our unpickler words a refusal, and how torch's does.
_REFUSALS = ("it holds", "Unsupported global", "Unsupported class")


def read_weights(path: str | Path, trust: bool = False) -> Any:
    """The object in a ``.pkl`` (numpy arrays) or a torch file (any other name, tensors on the CPU).

    Args:
        trust: unpickle anything, which may run code from the file. Only for files of your own.

    Raises:
        CheckpointError: no such file, a damaged one, or more than tensors, arrays, plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        if path.suffix != ".pkl":
            return torch.load(path, map_location="cpu", weights_only=not trust)
        with open(path, "rb") as stream:
            unpickler = pickle.Unpickler if trust else _ArrayUnpickler
            return unpickler(stream, encoding="latin1").load()
    except Exception as error:  # unpicklers raise anything over bytes that are no pickle
        # Torch's errors are often a page long; what matters is one sentence.
        text = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
        reason = text.splitlines()[0].split(". ")[0][:160]
        if any(refusal in str(error) for refusal in _REFUSALS):
            raise CheckpointError(
                f"{path}: refused, because reading it could run code from it ({reason}); expected "
                "tensors or arrays and plain values only. If the file is your own, "
                "convert_weights.py --trust reads it"
            ) from None
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as weights ({reason}); is it "
            "truncated, or another kind of file?"
        ) from None


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numbers, text, containers and numpy arrays; refuses every other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        found = _PICKLED.get((re.sub(r"^numpy\._?core\.", "", module), name))
        if found is None:
            raise pickle.UnpicklingError(f"{_REFUSALS[0]} {module}.{name}")
        return found


def to_array(value: Any) -> np.ndarray:
    """Float32 copy, contiguous, of a tensor or array of any shape."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().float().numpy()
    return np.array(value, dtype=np.float32, order="C")


def shapes_of(arrays: Arrays) -> dict[str, tuple[int, ...]]:
    """The shape of each array, by name."""
    return {name: array.shape for name, array in arrays.items()}

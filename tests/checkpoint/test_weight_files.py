"""Reading weights runs nothing from a file; damaged and foreign files are named."""

import codecs
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from jigsaw_d2.checkpoint.weight_files import read_weights
from jigsaw_d2.io import CheckpointError


def write_object(path: Path, value: object) -> None:
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(value, protocol=4))
    else:
        torch.save(value, path)


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", range(6))
def test_reads_arrays_of_any_pickle_protocol(protocol: int, tmp_path: Path) -> None:
    arrays = OrderedDict(a=np.arange(6, dtype=np.float32).reshape(2, 3), b=np.float64(2.5), c="x")
    arrays["f"] = np.asfortranarray(arrays["a"])
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(arrays, protocol=protocol))
    read = read_weights(tmp_path / "w.pkl")
    assert read["b"] == 2.5 and read["c"] == "x"
    assert np.array_equal(read["a"], arrays["a"]) and np.array_equal(read["f"], arrays["a"])


def test_reads_pickles_of_python_2(tmp_path: Path) -> None:
    """MSRA's files are such: numpy's old module names, text as raw bytes."""
    raw = pickle.dumps({"conv1_w": np.arange(3, dtype=np.float32)}, protocol=2)
    raw = raw.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "w.pkl").write_bytes(raw)
    assert np.array_equal(read_weights(tmp_path / "w.pkl")["conv1_w"], [0, 1, 2])


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_never_runs_code_unless_trusted(suffix: str, tmp_path: Path) -> None:
    weights, witness = tmp_path / f"w{suffix}", tmp_path / "ran"
    write_object(weights, {"model": {}, "bomb": Bomb(witness)})
    with pytest.raises(CheckpointError, match="could run code from it.*--trust"):
        read_weights(weights)
    assert not witness.exists()
    read_weights(weights, trust=True)
    assert witness.exists()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ((os.system, ("true",)), "could run code"),
        ((eval, ("1",)), "could run code"),
        ((np.load, ("x",)), "could run code"),
        ((getattr, ("a", "upper")), "could run code"),
        ((codecs.encode, ("x", "rot13")), "rot13"),  # which spells bytes, and nothing else
    ],
)
def test_refuses_functions_by_name(call: tuple, message: str, tmp_path: Path) -> None:
    class Call:
        def __reduce__(self) -> tuple:
            return call

    (tmp_path / "w.pkl").write_bytes(pickle.dumps(Call()))
    with pytest.raises(CheckpointError, match=message):
        read_weights(tmp_path / "w.pkl")


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
@pytest.mark.parametrize("keep", [0, 1, 50, 2000])
def test_truncated_and_foreign_files(suffix: str, keep: int, tmp_path: Path) -> None:
    weights = tmp_path / f"w{suffix}"
    value = torch.zeros(64, 64) if suffix == ".pth" else np.zeros((64, 64))
    write_object(weights, {"model": {"a": value}})
    weights.write_bytes(weights.read_bytes()[:keep])
    letter = tmp_path / f"letter{suffix}"
    letter.write_text("These are not weights, but a letter.\n" * 20)
    for path in (weights, letter):
        with pytest.raises(CheckpointError, match=f"{path.name}.*truncated, or another kind"):
            read_weights(path)
    with pytest.raises(CheckpointError, match="no such file"):
        read_weights(tmp_path / "absent.pth")

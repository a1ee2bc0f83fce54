"""From a checkpoint to weights that a detector loads, with their passport.

Accepted: our checkpoints (mid-training too) or the folder of a run, files already converted, and
the ImageNet files of torchvision and of MSRA.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jigsaw_d2.errors import JigsawError
from jigsaw_d2.weights.architecture import check_architecture
from jigsaw_d2.weights.imagenet_weights import (
    from_msra,
    from_torchvision,
    is_msra,
    is_torchvision,
    keep_resnet,
    name_from_torchvision,
    to_array,
    to_torchvision,
)
from jigsaw_d2.weights.passport import PASSPORT_KEY, Passport, compare_passports
from jigsaw_d2.weights.training_weights import from_training
from jigsaw_d2.weights.weight_files import (
    WeightFileError,
    check_free,
    read_weights,
    write_object,
    write_text,
)

logger = logging.getLogger(__name__)

FORMATS = ("detectron2", "torchvision")
AUTHOR = "jigsaw_d2"


class ConversionError(JigsawError, ValueError):
    """A file that is no checkpoint we know, or one whose tensors cannot be handed over."""


def convert_checkpoint(
    path: str | Path,
    output: str | Path,
    *,
    format: str = "detectron2",
    force: bool = False,
    trust: bool = False,
) -> Passport:
    """Write the backbone of ``path`` to ``output`` and the passport beside it; return the passport.

    Args:
        path: see the head of this file; a folder stands for the file its ``last_checkpoint`` names.
        output: ``.pkl`` (numpy arrays, as Detectron2's own converters write) or ``.pth`` (tensors
            and plain values). Keys carry no prefix, so that one file serves every detector.
        format: "detectron2", or "torchvision": a bare state dict, for ``.pth`` alone.
        force: replace ``output`` if it exists.
        trust: unpickle anything in ``path``, which may run code from it.

    Raises:
        JigsawError: a file of another kind, damaged, or in the way; a network that torchvision
            does not have; the message says what was found and what was expected.
    """
    output = Path(output)
    suffixes = {"detectron2": (".pkl", ".pth"), "torchvision": (".pth",)}
    if format not in FORMATS:
        raise ConversionError(f"format {format!r} is none of {FORMATS}")
    if output.suffix not in suffixes[format]:
        raise ConversionError(
            f"{output}: the {format} format is written as {' or '.join(suffixes[format])}"
        )
    for written in (output, passport_path(output)):
        check_free(written, force)
    arrays, passport = read_backbone(path, trust)
    passport = passport.sealed(arrays)
    write_object(output, _contents(arrays, passport, output.suffix, format), force)
    write_text(passport_path(output), passport.to_yaml(), force=True)
    logger.info("%s: %d tensors of the backbone, passport %s", output, len(arrays), passport.digest)
    return passport


def passport_path(weights: str | Path) -> Path:
    """Where the YAML beside a weight file is: ``weights.pkl`` -> ``weights.pkl.yaml``."""
    weights = Path(weights)
    return weights.with_name(weights.name + ".yaml")


def read_converted(path: str | Path, trust: bool = False) -> tuple[dict[str, np.ndarray], Passport]:
    """Tensors and passport of a converted file, after every check that the two belong together.

    Raises:
        JigsawError: no passport, one that was altered, or one that differs from the tensors or
            from the YAML beside the file.
    """
    data = read_weights(path, trust)
    passport_values = _passport_values(data)
    if passport_values is None:
        raise ConversionError(
            f"{path}: weights without a passport ({_describe(data)}); make one with "
            f"convert_weights.py --input {path} --output ..."
        )
    return _open_converted(Path(path), data, passport_values)


def read_backbone(path: str | Path, trust: bool = False) -> tuple[dict[str, np.ndarray], Passport]:
    """Backbone and passport of any accepted input, float32, under names without prefix.

    Raises:
        JigsawError: see ``convert_checkpoint``.
    """
    file = _resolve(Path(path))
    data = read_weights(file, trust)
    passport_values = _passport_values(data)
    if passport_values is not None:
        return _open_converted(file, data, passport_values)
    if isinstance(data, Mapping) and "jigsaw" in data and "model" in data:
        arrays, passport = from_training(data, str(file))
    else:
        arrays, passport = _from_imagenet(file, data)
        logger.info("%s: read as ImageNet weights, input %s", file, passport.input_format)
    _check_tensors(file, arrays, passport)
    return arrays, passport


def _resolve(path: Path) -> Path:
    if not path.is_dir():
        return path
    marker = path / "last_checkpoint"
    if not marker.is_file():
        raise WeightFileError(f"{path}: a folder without last_checkpoint; name a checkpoint file")
    return path / marker.read_text().strip()


def _passport_values(data: Any) -> Any | None:
    if not isinstance(data, Mapping):
        return None
    return data.get(PASSPORT_KEY, getattr(data, "_metadata", {}).get(PASSPORT_KEY))


def _open_converted(
    path: Path, data: Mapping[str, Any], values: Any
) -> tuple[dict[str, np.ndarray], Passport]:
    passport = Passport.from_dict(values, str(path))
    if PASSPORT_KEY in data:
        arrays = {name: to_array(value) for name, value in data["model"].items()}
    else:
        arrays = keep_resnet({name_from_torchvision(name): value for name, value in data.items()})
    beside = passport_path(path)
    if beside.is_file():
        other = Passport.from_yaml(beside.read_text(), str(beside))
        different = compare_passports(passport, other)
        if different:
            raise ConversionError(
                f"{path} and {beside.name} say different things (file / YAML): "
                f"{'; '.join(different)}; convert the checkpoint again, or remove the YAML"
            )
    _check_tensors(path, arrays, passport)
    passport.check_seal(arrays, str(path))
    return arrays, passport


def _from_imagenet(path: Path, data: Any) -> tuple[dict[str, np.ndarray], Passport]:
    tensors, author = data, ""
    if isinstance(data, Mapping):
        author = str(data.get("__author__", ""))
    for wrapping in ("model", "state_dict", "blobs"):
        if isinstance(tensors, Mapping) and isinstance(tensors.get(wrapping), Mapping):
            tensors = tensors[wrapping]
    names = set(tensors) if isinstance(tensors, Mapping) else set()
    if is_torchvision(names, author):
        return from_torchvision(tensors)
    if is_msra(names):
        return from_msra(tensors)
    raise ConversionError(
        f"{path}: no checkpoint that can be converted; found {_describe(data)}; expected a "
        "checkpoint of Jigsaw pre-training (keys model and jigsaw), a converted file, a state dict "
        "of a torchvision ResNet, or MSRA's R-50.pkl or R-101.pkl"
    )


def _check_tensors(path: Path, arrays: Mapping[str, np.ndarray], passport: Passport) -> None:
    if not arrays:
        raise ConversionError(f"{path}: no tensors of a backbone")
    broken = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if broken:
        raise ConversionError(
            f"{path}: {len(broken)} tensors hold NaN or infinity, the first is {broken[0]}; "
            "the training diverged: take an earlier checkpoint"
        )
    check_architecture(passport.architecture, {name: a.shape for name, a in arrays.items()})


def _contents(
    arrays: Mapping[str, np.ndarray], passport: Passport, suffix: str, format: str
) -> Mapping[str, Any]:
    if format == "torchvision":
        state = to_torchvision(arrays, passport)
        # load_state_dict looks here for module names alone; so the passport is no stray key
        state._metadata = {PASSPORT_KEY: passport.to_dict()}
        return state
    model: dict[str, Any] = dict(arrays)
    if suffix == ".pth":
        model = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {
        "model": model,
        "__author__": AUTHOR,
        "matching_heuristics": True,
        PASSPORT_KEY: passport.to_dict(),
    }


def _describe(data: Any) -> str:
    if not isinstance(data, Mapping):
        return f"a {type(data).__name__}"
    names = [re.sub(r"\s+", " ", str(name)) for name in list(data)[:5]]
    return f"{len(data)} keys ({', '.join(names)}{', ...' if len(data) > 5 else ''})"

"""From a checkpoint to weights that a detector or torchvision loads, with their metadata."""

import logging
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jigsaw_d2.checkpoint.formats import to_timm, to_torchvision
from jigsaw_d2.checkpoint.metadata import WeightsMetadata
from jigsaw_d2.checkpoint.reading import (
    METADATA_KEY,
    NOTE,
    PYRAMID_NAME,
    metadata_path,
    read_backbone,
)
from jigsaw_d2.io import ConfigError, open_atomically, write_text

logger = logging.getLogger(__name__)

FORMATS = ("detectron2", "torchvision", "timm", "state_dict")


def convert_checkpoint(
    path: str | Path,
    output: str | Path,
    *,
    origin: str = "",
    format: str = "detectron2",
    force: bool = False,
    trust: bool = False,
) -> WeightsMetadata:
    """Write the backbone of ``path`` to ``output`` and the metadata beside it; return the metadata.

    Args:
        path: see ``reading``; a folder stands for the file its ``last_checkpoint`` names.
        output: ``.pkl`` (numpy arrays, as Detectron2's own converters write) or ``.pth`` (tensors
            and plain values). Keys carry no prefix, so that one file serves every detector.
        origin: of weights in torchvision's form that ImageNet did not train: where they are from.
        format: "detectron2"; or, for ``.pth`` alone, a bare state dict: "torchvision", "timm", or
            "state_dict", of the backbone's own module.
        force: replace ``output`` if it exists.
        trust: unpickle anything in ``path``, which may run code from it.

    Raises:
        JigsawError: an unknown format or ending; ``output`` is in the way; see ``read_backbone``; a
            network that torchvision does not have.
    """
    output = Path(output)
    endings = {"detectron2": (".pkl", ".pth")} | dict.fromkeys(FORMATS[1:], (".pth",))
    if output.suffix not in endings.get(format, ()):
        raise ConfigError(
            f"{output}, format {format!r}: detectron2 is written as .pkl or .pth, "
            f"{', '.join(FORMATS[1:])} as .pth"
        )
    for written in (output, metadata_path(output)):
        check_free(written, force)
    arrays, metadata = read_backbone(path, trust)
    if origin:
        if metadata.origin != "imagenet" or origin in ("jigsaw", "scratch", "detector"):
            raise ConfigError(f"{path}: origin {origin!r}, but the file says {metadata.origin!r}")
        metadata = replace(metadata, origin=origin, dataset="")
    if format in ("torchvision", "timm") and metadata.levels:
        count = len(arrays)
        arrays = {n: array for n, array in arrays.items() if not PYRAMID_NAME.match(n)}
        metadata = replace(metadata, levels=None)
        logger.info("%s's network is no pyramid: left out %d tensors", format, count - len(arrays))
    metadata = metadata.sealed(arrays)
    values = metadata.to_dict()
    contents: Mapping[str, Any]
    if format == "timm" and not metadata.architecture.is_resnet:
        contents = to_timm(arrays, metadata)
    elif format == "state_dict":  # without norms that ``set_aside_unused`` has set aside
        contents = {name: torch.from_numpy(array) for name, array in arrays.items()}
    elif format in ("torchvision", "timm"):  # timm's ResNets have torchvision's names
        contents = to_torchvision(arrays, metadata.architecture)
        # load_state_dict looks here for module names alone; so the metadata is no stray key
        contents._metadata = {METADATA_KEY: values}
    else:
        as_stored = torch.from_numpy if output.suffix == ".pth" else np.asarray
        model = {name: as_stored(array) for name, array in arrays.items()}
        note = ", ".join(f"{key} {value}" for key, value in metadata.required_config().items())
        model[NOTE + note] = as_stored(np.zeros(0, np.float32))
        contents = {"model": model, "__author__": "jigsaw_d2", "matching_heuristics": True}
        contents[METADATA_KEY] = values
    output.parent.mkdir(parents=True, exist_ok=True)
    with open_atomically(output) as stream:
        if output.suffix == ".pkl":
            pickle.dump(contents, stream, protocol=4)
        else:
            torch.save(contents, stream)
    write_text(metadata_path(output), metadata.to_yaml())
    logger.info("%s: %d tensors of the backbone, digest %s", output, len(arrays), metadata.digest)
    if metadata.levels:
        logger.info("trained by the features %s", ", ".join(metadata.levels["trained"]))
    return metadata


def check_free(path: str | Path, force: bool) -> None:
    """Raise ``ConfigError`` if ``path`` exists and must not be replaced."""
    if Path(path).exists() and not force:
        raise ConfigError(f"{path} exists; --force replaces it")

"""A whole detector's checkpoint, as Detectron2 writes it, as the start of another training."""

import logging
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from torch import nn

from jigsaw_d2.checkpoint.metadata import Architecture, WeightsMetadata
from jigsaw_d2.checkpoint.reading import read_tensors
from jigsaw_d2.checkpoint.weight_files import Arrays
from jigsaw_d2.io import CheckpointError, WeightsError
from jigsaw_d2.modeling.backbones import library_of

logger = logging.getLogger(__name__)

ORIGIN = "detector"


def detector_metadata(path: str | Path, arrays: Arrays) -> WeightsMetadata:
    """What the training of a detector says of it, in the ``config.yaml`` beside its checkpoint.

    ``architecture.norm`` is the very norm, such as "FrozenBN", and no family.

    Raises:
        CheckpointError: there is no such file, or it is no config of Detectron2's.
    """
    path = Path(path)
    config = (path if path.is_dir() else path.parent) / "config.yaml"
    try:
        content = yaml.safe_load(config.read_text())
        model, inputs = content["MODEL"], content["INPUT"]
        architecture = {**vars(Architecture.from_config(model)), "norm": model["RESNETS"]["NORM"]}
        pixels = (tuple(float(v) for v in model[f"PIXEL_{key}"]) for key in ("MEAN", "STD"))
        metadata = WeightsMetadata(ORIGIN, Architecture(**architecture), inputs["FORMAT"], *pixels)
        if library := library_of(metadata.architecture.backbone):
            node = model[library.upper()]
            config = {f"MODEL.{library.upper()}.{key}": node[key] for key in ("NAME", "KWARGS")}
            network = {"backbone": metadata.architecture.backbone, "config": config}
            metadata = replace(metadata, network={**network, "batch_norm": node["FREEZE_NORM"]})
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{path}: a detector's checkpoint, of which config.yaml must tell how its input was "
            f"normalised; put the one that its training wrote beside it ({error!r})"
        ) from None
    return metadata.sealed(arrays)


def load_detector(module: nn.Module, file: str | Path, strict: bool = True) -> None:
    """Copy every tensor of the detector in ``file`` into ``module``, in place.

    Args:
        strict: False loads what fits and warns about the rest, instead of stopping.

    Raises:
        WeightsError: a tensor that one of the two lacks, or of another shape; nothing is loaded.
    """
    held, state = read_tensors(file)[0], module.state_dict()
    # What batch norms count is of no use, and frozen ones have none.
    ours, theirs = (
        {name for name in names if not name.endswith("num_batches_tracked")}
        for names in (state, held)
    )
    other = {n for n in ours & theirs if held[n].shape != tuple(state[n].shape)}
    shapes = [f"{n}: file {held[n].shape}, network {tuple(state[n].shape)}" for n in sorted(other)]
    found = {
        "in the network, not in the file": sorted(ours - theirs),
        "in the file, not in the network": sorted(theirs - ours),
        "of other shapes": shapes,
    }
    mismatch = "; ".join(f"{title}: {', '.join(n)}" for title, n in found.items() if n)
    if mismatch and strict:
        raise WeightsError(
            f"{file} is another detector; nothing was loaded. Tensors {mismatch}. Choose the "
            "config and the classes that it was trained with"
        )
    with torch.no_grad():
        for name in (ours & theirs) - other:
            state[name].copy_(torch.from_numpy(held[name]))
    if mismatch:
        logger.warning("%s loaded as far as it fits. Tensors %s", file, mismatch)
    else:
        logger.info("%s: all %d tensors of the detector loaded", file, len(ours))

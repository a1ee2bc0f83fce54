"""Converted weights for those who know no Detectron2: timm's networks, and the bare module's."""

from collections import OrderedDict
from collections.abc import Mapping

import numpy as np
import torch

from jigsaw_d2.checkpoint.metadata import WeightsMetadata
from jigsaw_d2.io import WeightsError
from jigsaw_d2.modeling.backbones import import_library


def to_module(arrays: Mapping[str, np.ndarray]) -> OrderedDict:
    """A state dict, tensors of any shapes, of the backbone's module by its own names."""
    return OrderedDict((name, torch.from_numpy(np.array(a))) for name, a in arrays.items())


def to_timm(arrays: Mapping[str, np.ndarray], metadata: WeightsMetadata) -> OrderedDict:
    """A state dict, tensors of any shapes, for ``timm.create_model(name, checkpoint_path=...)``.

    What a network has behind its features, its classifier, keeps timm's initialisation, for strict
    loading asks for it.

    Raises:
        WeightsError: the backbone is not timm's, or timm's network has no place for a tensor.
    """
    config = (metadata.network or {"config": {}})["config"]
    if "MODEL.TIMM.NAME" not in config:
        raise WeightsError(
            "timm has no such network: these weights were not trained with build_timm_backbone; "
            "write the detectron2 format, or state_dict"
        )
    options = {"in_chans": metadata.network["input_channels"], **dict(config["MODEL.TIMM.KWARGS"])}
    with torch.random.fork_rng(devices=[]):
        model = import_library("timm").create_model(config["MODEL.TIMM.NAME"], **options)
    state, used = model.state_dict(), set()
    for name, value in state.items():
        for place in _places(name):
            if place in arrays and arrays[place].shape == tuple(value.shape):
                value.copy_(torch.from_numpy(arrays[place]))
                used.add(place)
                break
    left = sorted(set(arrays) - used)
    if left:
        raise WeightsError(f"timm's {config['MODEL.TIMM.NAME']} has no {', '.join(left[:4])}")
    return state


def _places(name: str) -> list[str]:
    """What timm calls a tensor in its feature networks: stages_0.x or model.stages.0.x."""
    flat = [name.replace(".", "_", count) for count in range(name.count("."))]
    return [f"net.{place}" for place in (*flat, f"model.{name}")]

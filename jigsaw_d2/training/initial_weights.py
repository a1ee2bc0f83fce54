"""Pre-training that starts from given weights instead of random ones (MODEL.WEIGHTS)."""

import logging
from pathlib import Path

import torch
from detectron2.config import CfgNode
from torch import nn

from jigsaw_d2.checkpoint import read_backbone
from jigsaw_d2.errors import JigsawError
from jigsaw_d2.weights.backbone_loading import backbone_names
from jigsaw_d2.weights.passport import Passport

logger = logging.getLogger(__name__)


class InitialWeightsError(JigsawError, RuntimeError):
    """Weights of another network, or made for other input than this run gives it."""


def load_initial_weights(model: nn.Module, weights: str | Path, cfg: CfgNode) -> None:
    """Fill every tensor of the backbone; the classifier stays random.

    Args:
        model: ``JigsawPretrainer``.
        weights: ours, a converted file, or ImageNet weights as torchvision or MSRA have them.
        cfg: what the run does with its images; must agree with what the weights expect.

    Raises:
        InitialWeightsError: listing names, shapes or keys that differ; nothing is loaded then.
    """
    arrays, passport = read_backbone(weights)
    _check_input(weights, passport, cfg)
    state = model.state_dict()
    ours = backbone_names(state)
    missing = sorted(set(ours) - set(arrays))
    unused = sorted(set(arrays) - set(ours))
    shapes = sorted(
        f"{name} {arrays[name].shape} for {tuple(state[key].shape)}"
        for name, key in ours.items()
        if name in arrays and arrays[name].shape != tuple(state[key].shape)
    )
    if missing or unused or shapes:
        raise InitialWeightsError(
            f"MODEL.WEIGHTS {weights} does not fit the backbone of this config: "
            f"{_some('missing in the file', missing)}{_some('unknown to the backbone', unused)}"
            f"{_some('of another shape', shapes)}choose the config of the same network"
        )
    with torch.no_grad():
        for name, key in ours.items():
            state[key].copy_(torch.from_numpy(arrays[name]))
    logger.info(
        "starting from %s: %d backbone tensors, all of them; new classifier", weights, len(ours)
    )


def _check_input(weights: str | Path, passport: Passport, cfg: CfgNode) -> None:
    """Weights expect the channels, the normalisation and the stride they were trained with."""
    said = {
        "INPUT.FORMAT": (cfg.INPUT.FORMAT, passport.input_format),
        "MODEL.PIXEL_MEAN": (list(cfg.MODEL.PIXEL_MEAN), list(passport.pixel_mean)),
        "MODEL.PIXEL_STD": (list(cfg.MODEL.PIXEL_STD), list(passport.pixel_std)),
    }
    if passport.architecture.stride_in_1x1 is not None:
        ours = bool(cfg.MODEL.RESNETS.STRIDE_IN_1X1)
        said["MODEL.RESNETS.STRIDE_IN_1X1"] = (ours, passport.architecture.stride_in_1x1)
    wrong = {key: want for key, (have, want) in said.items() if not _same(have, want)}
    if wrong:
        keys = ", ".join(f"{key} {want}" for key, want in wrong.items())
        raise InitialWeightsError(f"MODEL.WEIGHTS {weights} was made with {keys}; set them so")


def _same(have: object, want: object) -> bool:
    if isinstance(have, list) and isinstance(want, list):
        return len(have) == len(want) and all(abs(a - b) < 1e-2 for a, b in zip(have, want))
    return have == want


def _some(title: str, names: list[str]) -> str:
    return f"{len(names)} {title} ({', '.join(names[:5])}); " if names else ""

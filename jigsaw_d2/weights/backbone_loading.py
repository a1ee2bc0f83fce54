"""Weights into a detector's backbone: all of them, or none and a list of what differs.

Detectron2's own loading matches names by suffix and only warns about the rest; a backbone that
half loads trains all the same, and worse.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from jigsaw_d2.checkpoint import read_converted
from jigsaw_d2.errors import JigsawError
from jigsaw_d2.weights.passport import Passport

logger = logging.getLogger(__name__)

# Where a detector keeps the stages of its backbone: inside an FPN, bare, or (C4) in the RoI heads.
_FPN, _BARE, _ROI_STAGE = "backbone.bottom_up.", "backbone.", "roi_heads.res5."


class BackboneMismatchError(JigsawError, RuntimeError):
    """Weights and detector do not have the same backbone; the message lists both sides."""


@dataclass(frozen=True)
class LoadReport:
    """What ``load_backbone`` did.

    Attributes:
        filled: names in the detector, each filled from the file.
        new_offsets: offsets of deformable stages that start at zero; empty unless asked for.
        new_modules: the detector's other modules with tensors; they keep their initialisation.
    """

    filled: tuple[str, ...]
    new_offsets: tuple[str, ...]
    new_modules: tuple[str, ...]


def load_backbone(
    model: nn.Module, weights: str | Path, *, new_offsets: bool = False, partial: bool = False
) -> LoadReport:
    """Copy a converted file into the backbone of ``model``, in place.

    Args:
        model: any detector of Detectron2's; C4, FPN, RetinaNet, with or without masks.
        weights: a converted file with its passport.
        new_offsets: offsets of deformable stages that the file lacks start at zero, hence as a
            plain convolution.
        partial: load what fits and warn about the rest, instead of stopping.

    Raises:
        BackboneMismatchError: a tensor of the backbone is not in the file, a tensor of the file is
            not in the backbone, shapes differ, or the detector normalises its input or strides
            otherwise than the passport says. Nothing is loaded then.
        JigsawError: the file cannot be trusted or read.
    """
    arrays, passport = read_converted(weights)
    state = model.state_dict()
    ours = backbone_names(state)
    fresh = {
        name for name in ours if new_offsets and ".conv2_offset." in name and name not in arrays
    }
    missing = sorted(set(ours) - set(arrays) - fresh)
    unused = sorted(set(arrays) - set(ours))
    shared = sorted(set(ours) & set(arrays))
    shapes = [
        f"{name}: file {arrays[name].shape}, detector {tuple(state[ours[name]].shape)}"
        for name in shared
        if arrays[name].shape != tuple(state[ours[name]].shape)
    ]
    use = _other_use(model, passport)
    if missing or unused or shapes or use:
        message = _mismatch(weights, missing, unused, shapes, use)
        if not partial:
            raise BackboneMismatchError(message)
        logger.warning("%s", message)
    wrong = {line.split(":")[0] for line in shapes}
    filled = [name for name in shared if name not in wrong]
    _fill(state, {ours[name]: arrays[name] for name in filled}, [ours[name] for name in fresh])
    report = LoadReport(
        filled=tuple(ours[name] for name in filled),
        new_offsets=tuple(sorted(ours[name] for name in fresh)),
        new_modules=_other_modules(state, set(ours.values())),
    )
    _log(weights, report)
    return report


def backbone_names(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Names as in a converted file -> names in the detector, of every tensor of its backbone."""
    prefix = _FPN if any(name.startswith(_FPN) for name in state) else _BARE
    names = {}
    for name in state:
        if name.endswith("num_batches_tracked"):
            continue
        if name.startswith(prefix):
            names[name.removeprefix(prefix)] = name
        elif name.startswith(_ROI_STAGE):
            names[name.removeprefix("roi_heads.")] = name
    return names


@torch.no_grad()
def _fill(
    state: Mapping[str, torch.Tensor], values: Mapping[str, np.ndarray], zeros: list[str]
) -> None:
    for name, array in values.items():
        state[name].copy_(torch.from_numpy(array))
    for name in zeros:
        state[name].zero_()


def _other_use(model: nn.Module, passport: Passport) -> list[str]:
    """What the detector does otherwise than the pre-training did, though every shape may fit."""
    said = {
        "pixel_mean": tuple(passport.pixel_mean),
        "pixel_std": tuple(passport.pixel_std),
        "input_format": passport.input_format,
        "stride_in_1x1": passport.architecture.stride_in_1x1,
    }
    done = {"input_format": getattr(model, "input_format", None), "stride_in_1x1": None}
    for key in ("pixel_mean", "pixel_std"):
        values = getattr(model, key, None)
        done[key] = None if values is None else tuple(values.flatten().tolist())
    for name, module in model.named_modules():
        if name.endswith("res3.0") and hasattr(module, "conv3"):  # a bottleneck that strides
            done["stride_in_1x1"] = module.conv1.stride == (2, 2)
    return [
        f"{key}: file {value}, detector {done[key]}"
        for key, value in said.items()
        if None not in (value, done[key]) and not _close(value, done[key])
    ]


def _close(one: object, other: object) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and np.allclose(one, other, rtol=0, atol=1e-3)
    return one == other


def _mismatch(
    weights: str | Path, missing: list[str], unused: list[str], shapes: list[str], use: list[str]
) -> str:
    lines = [f"{weights} does not fit the detector's backbone; nothing was loaded."]
    for title, names in (
        ("In the detector, not in the file", missing),
        ("In the file, not in the detector", unused),
        ("Other shapes", shapes),
        ("Used otherwise than in the pre-training", use),
    ):
        if names:
            lines.append(f"  {title} ({len(names)}):")
            lines.extend(f"    {name}" for name in names)
    lines.append("finetune_net.py sets the config from the passport; so does --write-config.")
    return "\n".join(lines)


def _other_modules(state: Mapping[str, torch.Tensor], filled: set[str]) -> tuple[str, ...]:
    """Two leading parts of each name that is not the backbone's, such as roi_heads.box_head."""
    rest = (name for name in state if name not in filled and "num_batches" not in name)
    return tuple(sorted({".".join(name.split(".")[:2]) for name in rest if "." in name}))


def _log(weights: str | Path, report: LoadReport) -> None:
    logger.info("%s: all %d tensors of the backbone loaded", weights, len(report.filled))
    if report.new_offsets:
        logger.info("%d offsets of deformable stages start at zero", len(report.new_offsets))
    logger.info("new, with random weights: %s", ", ".join(report.new_modules))

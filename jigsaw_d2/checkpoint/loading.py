"""The one loader: weights into the backbone of any network, with a report of what fits.

Detectron2's own loading matches names by suffix and only warns about the rest; a backbone that half
loads trains all the same, and worse. Here all of it loads, or nothing does.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.modeling import FPN, Backbone
from torch import nn

from jigsaw_d2.checkpoint.convert import read_tensors
from jigsaw_d2.checkpoint.metadata import STAGES, WeightsMetadata, fits
from jigsaw_d2.io import WeightsError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """What ``load_backbone`` found."""

    filled: tuple[str, ...]  # names in the network, each filled from the file
    mismatch: str  # what does not fit, in lines; "" where all has its counterpart and its use
    # In the file, of parts that the network has not (RPN on C4: res5; all C4: the pyramid).
    no_room: tuple[str, ...]
    new_offsets: tuple[str, ...]  # of deformable stages, in the network, that start at zero
    new_modules: tuple[str, ...]  # the network's others with tensors; they keep their values


def load_backbone(
    module: nn.Module,
    file: str | Path,
    strict: bool = True,
    *,
    input_format: str = "",
    new_offsets: bool = False,
    trust: bool = False,
) -> LoadReport:
    """Copy the weights in ``file`` into the backbone of ``module``, in place.

    Args:
        module: any detector of Detectron2's, a ``JigsawPretrainer``, or a backbone by itself; the
            pyramid of an FPN is filled where the file has one, and else keeps its initialisation.
        file: what ``read_backbone`` accepts; for a backbone by itself, which normalises nothing,
            weights without metadata too, such as any model of Detectron2's.
        strict: False loads what fits and warns about the rest, instead of stopping.
        input_format: "RGB" or "BGR", what ``module`` is given, where it does not say so itself.
        new_offsets: deformable stages may start from plain ones, with offsets of zero.
        trust: see ``read_weights``.

    Raises:
        WeightsError: a tensor of the backbone is not in the file, a tensor of the file is not in
            the backbone though its stage is, shapes differ, or the network normalises its input or
            strides otherwise than the metadata says. Nothing is loaded then.
        JigsawError: the file cannot be trusted or read.
    """
    arrays, metadata = read_tensors(file, trust)
    alone = isinstance(module, Backbone)
    if metadata is None and not alone:
        raise WeightsError(
            f"{file}: weights without metadata, which says how their input was normalised; make "
            f"such with convert_weights.py --input {file} --output ..."
        )
    state = module.state_dict()
    body, pyramid = _by_place(state, "" if alone else "backbone.")
    held = arrays
    if metadata is None:
        prefix = "backbone." if any(name.startswith("backbone.") for name in arrays) else ""
        theirs, more = _by_place(arrays, prefix)
        theirs |= {name: key for name, key in more.items() if name in pyramid}
        held = {name: arrays[key] for name, key in theirs.items()}
    # Of a pyramid each module that the file has, and that wholly; the others stay as they are.
    modules = {name.split(".")[0] for name in held}
    ours = body | {name: k for name, k in pyramid.items() if name.split(".")[0] in modules}
    fresh = {n for n in ours if new_offsets and ".conv2_offset." in n and n not in held}
    parts = {*STAGES, *(m for m in modules if m.startswith(("fpn_", "top_block")))}
    absent = parts - {name.split(".")[0] for name in ours}
    no_room = sorted(name for name in held if name.split(".")[0] in absent)
    shared = sorted(set(ours) & set(held))
    other_shape = [n for n in shared if held[n].shape != tuple(state[ours[n]].shape)]
    filled = {ours[name]: held[name] for name in shared if name not in other_shape}
    shapes = [
        f"{name}: file {held[name].shape}, network {tuple(state[ours[name]].shape)}"
        for name in other_shape
    ]
    mismatches = {
        "In the network, not in the file": sorted(set(ours) - set(held) - fresh),
        "In the file, not in the network": sorted(set(held) - set(ours) - set(no_room)),
        "Other shapes": shapes,
        "Used otherwise than in the pre-training": _other_use(module, metadata, input_format),
    }
    report = LoadReport(
        filled=tuple(filled),
        mismatch="\n".join(
            "\n    ".join([f"  {title} ({len(lines)}):", *lines])
            for title, lines in mismatches.items()
            if lines
        ),
        no_room=tuple(no_room),
        new_offsets=tuple(sorted(ours[name] for name in fresh)),
        new_modules=_modules(set(state) - set(ours.values())),
    )
    if strict and report.mismatch:
        raise WeightsError(
            f"{file} does not fit the network's backbone; nothing was loaded.\n"
            f"{report.mismatch}\nChoose the config of the same network; finetune_net.py and "
            "convert_weights.py --write-config set it from the weights' metadata."
        )
    with torch.no_grad():
        for name, array in filled.items():
            state[name].copy_(torch.from_numpy(array))
        for name in report.new_offsets:
            state[name].zero_()
    _log(file, report, alone)
    return report


def _by_place(names: Iterable[str], prefix: str) -> tuple[dict[str, str], dict[str, str]]:
    """({name in a converted file: name here}, the same of what a pyramid adds to its backbone).

    A backbone's stages lie bare, inside an FPN (bottom_up), or, C4's res5, in the RoI heads.
    """
    names = [name for name in names if not name.endswith("num_batches_tracked")]
    body = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
    pyramid: dict[str, str] = {}
    if any(name.startswith("bottom_up.") for name in body):
        pyramid = {n: key for n, key in body.items() if not n.startswith("bottom_up.")}
        body = {n.removeprefix("bottom_up."): k for n, k in body.items() if n not in pyramid}
    for name in names:
        if name.startswith("roi_heads.res5."):
            body[name.removeprefix("roi_heads.")] = name
    return body, pyramid


def _other_use(module: nn.Module, metadata: WeightsMetadata | None, input_format: str) -> list[str]:
    """What the network does otherwise than the pre-training did, though every shape may fit."""
    if metadata is None:
        return []
    said = {
        "pixel_mean": metadata.pixel_mean,
        "pixel_std": metadata.pixel_std,
        "input_format": metadata.input_format,
        "stride_in_1x1": metadata.architecture.stride_in_1x1,
        "fuse_type": (metadata.levels or {}).get("fuse_type"),
    }
    done = {"input_format": input_format or getattr(module, "input_format", None)}
    for key in ("pixel_mean", "pixel_std"):
        if hasattr(module, key):
            done[key] = tuple(getattr(module, key).flatten().tolist())
    for name, block in module.named_modules():
        if name.endswith("res3.0") and hasattr(block, "conv3"):  # a bottleneck that strides
            done["stride_in_1x1"] = block.conv1.stride == (2, 2)
        if isinstance(block, FPN):
            done["fuse_type"] = block._fuse_type
    return [
        f"{key}: file {value}, network {done[key]}"
        for key, value in said.items()
        if None not in (value, done.get(key)) and not fits(key, done[key], value)
    ]


def _modules(names: Iterable[str]) -> tuple[str, ...]:
    """Leading parts, two at most, of the modules with these tensors, such as roi_heads.box_head."""
    parents = {n.rpartition(".")[0] for n in names if not n.endswith("num_batches_tracked")}
    return tuple(sorted({".".join(name.split(".")[:2]) for name in parents if name}))


def _log(file: str | Path, report: LoadReport, alone: bool) -> None:
    count = len(report.filled)
    if report.mismatch:
        logger.warning("%s: %d tensors loaded, but\n%s", file, count, report.mismatch)
    else:
        logger.info("%s: all %d tensors of the backbone loaded", file, count)
    if report.no_room:
        stages = ", ".join(sorted({name.split(".")[0] for name in report.no_room}))
        left_out = len(report.no_room)
        logger.warning("%s: the network has no %s; left out %d tensors", file, stages, left_out)
    if report.new_offsets:
        logger.info("%d offsets of deformable stages start at zero", len(report.new_offsets))
    if report.new_modules:
        level = logging.WARNING if alone else logging.INFO  # a detector's heads are always new
        logger.log(level, "new, with random weights: %s", ", ".join(report.new_modules))

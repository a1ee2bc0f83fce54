"""The one loader: weights into the backbone of any network, with a report of what fits.

Detectron2's own loading matches names by suffix and only warns about the rest; a backbone that half
loads trains all the same, and worse. Here all of it loads, or nothing does.
"""

import copy
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.modeling import FPN, Backbone
from torch import nn

from jigsaw_d2.checkpoint.metadata import (
    STAGES,
    Shapes,
    WeightsMetadata,
    fits,
    read_architecture,
)
from jigsaw_d2.checkpoint.network import (
    TOLERANCE,
    compute_features,
    difference,
    fill,
    find_prefix,
    normalise,
    picture,
    strides_in_1x1,
)
from jigsaw_d2.checkpoint.positions import resize_positions
from jigsaw_d2.checkpoint.reading import read_tensors
from jigsaw_d2.io import WeightsError

logger = logging.getLogger(__name__)

# What mismatches that are not of names and shapes are called.
OTHER_USE = "Used otherwise than in the pre-training"
OTHER_FEATURES = "Other features of a fixed picture"


@dataclass(frozen=True)
class LoadReport:
    """What ``load_backbone`` found."""

    filled: tuple[str, ...]  # names in the network, each filled from the file
    mismatch: str  # what does not fit, in lines; "" where all has its counterpart and its use
    # In the file, of parts that the network has not (RPN on C4: res5; all C4: the pyramid).
    no_room: tuple[str, ...]
    new_offsets: tuple[str, ...]  # of deformable stages, in the network, that start at zero
    interpolated: tuple[str, ...]  # position embeddings, in the network, fitted to its grid
    new_outputs: tuple[str, ...]  # in the network, for outputs that the pre-training did not use
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
        WeightsError: a tensor of the backbone is not in the file, though an output that was trained
            depends on it; a tensor of the file is not in the backbone though its stage is; shapes
            differ; the network normalises its input or strides otherwise than the metadata says, or
            gives a fixed picture other features than the pre-training's. Nothing is loaded then.
        JigsawError: the file cannot be trusted or read.
    """
    arrays, metadata = read_tensors(file, trust)
    alone = isinstance(module, Backbone)
    if metadata is None and not alone:
        raise WeightsError(
            f"{file}: weights without metadata, which says how their input was normalised; make "
            f"such with convert_weights.py --input {file} --output ..."
        )
    match = _match(module, arrays, metadata, new_offsets)
    mismatches = {
        "In the file, not in the network": match.stray,
        "Other shapes": match.other_shapes(),
        OTHER_USE: _other_use(module, metadata, input_format),
    }
    missing, new_outputs, other_features = match.missing, [], []
    if metadata and metadata.network and not any(mismatches.values()):
        found = _compare_features(module, match, metadata, input_format)
        missing, new_outputs, other_features = found
    mismatches["In the network, not in the file"] = missing
    mismatches[OTHER_FEATURES] = other_features
    report = LoadReport(
        filled=tuple(match.filled),
        mismatch=_in_words(module, match, mismatches),
        no_room=tuple(match.no_room),
        new_offsets=tuple(sorted(match.ours[name] for name in match.fresh)),
        interpolated=tuple(match.ours[name] for name in sorted(match.grids)),
        new_outputs=tuple(match.ours[name] for name in new_outputs),
        new_modules=_modules(set(match.state) - set(match.ours.values())),
    )
    if strict and report.mismatch:
        raise WeightsError(
            f"{file} does not fit the network's backbone; nothing was loaded.\n"
            f"{report.mismatch}\nChoose the config of the same network; finetune_net.py and "
            "convert_weights.py --write-config set it from the weights' metadata."
        )
    with torch.no_grad():
        for name, array in match.filled.items():
            match.state[name].copy_(torch.from_numpy(array))
        for name in report.new_offsets:
            match.state[name].zero_()
    _log(file, report, alone)
    return report


@dataclass(frozen=True)
class _Match:
    """Tensors of a file and those of a network, by their names in a converted file."""

    state: dict[str, torch.Tensor]  # the network's, by its own names
    prefix: str  # of the backbone in these
    body: dict[str, str]  # {name: name in the network} of the backbone, without a pyramid
    ours: dict[str, str]  # the same of all that the file should fill
    held: dict[str, np.ndarray]  # the file's; position embeddings on the network's grid
    grids: frozenset[str]  # of those, the interpolated ones
    fresh: frozenset[str]  # offsets of deformable stages that start at zero
    no_room: list[str]  # the file's, of parts that the network has not

    @property
    def missing(self) -> list[str]:
        """What the file should fill, and has not."""
        return sorted(self.ours.keys() - self.held.keys() - self.fresh)

    @property
    def stray(self) -> list[str]:
        """What the network has not, though it has the rest of that part."""
        return sorted(self.held.keys() - self.ours.keys() - set(self.no_room))

    @property
    def filled(self) -> dict[str, np.ndarray]:
        """What fits, by its name in the network."""
        shared = sorted(self.ours.keys() & self.held.keys())
        return {self.ours[n]: self.held[n] for n in shared if self.held[n].shape == self.shape(n)}

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the network's tensor of that name."""
        return tuple(self.state[self.ours[name]].shape)

    def other_shapes(self) -> list[str]:
        """What does not fit, with both shapes."""
        return [
            f"{name}: file {self.held[name].shape}, network {self.shape(name)}"
            for name in sorted(self.ours.keys() & self.held.keys())
            if self.held[name].shape != self.shape(name)
        ]


def _match(
    module: nn.Module,
    arrays: Mapping[str, np.ndarray],
    metadata: WeightsMetadata | None,
    new_offsets: bool,
) -> _Match:
    """Which tensor goes where; the network stays as it is."""
    state, alone = module.state_dict(), isinstance(module, Backbone)
    prefix = find_prefix(state, arrays if metadata else ())
    body, pyramid = _by_place(state, prefix, alone)
    held = dict(arrays)
    if metadata is None:
        theirs, more = _by_place(arrays, find_prefix(arrays, body), alone)
        theirs |= {name: key for name, key in more.items() if name in pyramid}
        held = {name: arrays[key] for name, key in theirs.items()}
    # Of a pyramid each module that the file has, and that wholly; the others stay as they are.
    modules = {name.split(".")[0] for name in held}
    ours = body | {name: k for name, k in pyramid.items() if name.split(".")[0] in modules}
    fresh = {n for n in ours if new_offsets and ".conv2_offset." in n and n not in held}
    parts = {*STAGES, *(m for m in modules if m.startswith(("fpn_", "top_block")))}
    absent = parts - {name.split(".")[0] for name in ours}
    no_room = sorted(name for name in held if name.split(".")[0] in absent)
    grids = {}
    for name in ours.keys() & held.keys():
        shape = tuple(state[ours[name]].shape)
        resized = None if held[name].shape == shape else resize_positions(name, held[name], shape)
        if resized is not None:
            grids[name] = resized
    names = frozenset(grids), frozenset(fresh)
    return _Match(state, prefix, body, ours, held | grids, *names, no_room)


def _compare_features(
    module: nn.Module, match: _Match, metadata: WeightsMetadata, input_format: str
) -> tuple[list[str], list[str], list[str]]:
    """(what the file lacks, what of that is for outputs not trained, features that differ).

    Between position embeddings of two grids features differ, and are not compared.
    """
    zeros = {name: np.zeros(match.shape(name)) for name in match.fresh}
    held, network, missing = match.held | zeros, metadata.network, match.missing
    if match.grids and not missing:
        return [], [], []
    features = _features(module, match.prefix, held, metadata, input_format)
    if not missing:
        return [], [], _other_features(features, network)
    trained = network["in_feature"]
    known = trained in features.keys() & network["features"].keys()
    if known and set(missing) <= set(match.body):
        changed = {name: np.random.default_rng(0).random(match.shape(name)) for name in missing}
        moved = _features(module, match.prefix, held | changed, metadata, input_format)
        cells = features[trained].shape[2:].numel()
        higher = {n: value for n, value in features.items() if value.shape[2:].numel() <= cells}
        same = match.grids or not _other_features(higher, network)
        if same and all(torch.equal(value, moved[name]) for name, value in higher.items()):
            return [], missing, []
    return missing, [], []


def _in_words(module: nn.Module, match: _Match, mismatches: Mapping[str, list[str]]) -> str:
    """What does not fit, in lines; "" where all does. Where the cause is known, it comes first."""
    reasons = []
    if any(
        lines for title, lines in mismatches.items() if title not in (OTHER_USE, OTHER_FEATURES)
    ):
        network = {name: tuple(match.state[key].shape) for name, key in match.body.items()}
        reasons = _reasons({n: array.shape for n, array in match.held.items()}, network, module)
    texts = ["\n    ".join([f"  Another network ({len(reasons)}):", *reasons])] if reasons else []
    for title, lines in mismatches.items():
        shown = lines[:3] if reasons else lines
        shown = [*shown, "..."] if len(shown) < len(lines) else shown
        texts += ["\n    ".join([f"  {title} ({len(lines)}):", *shown])] if lines else []
    return "\n".join(texts)


def _by_place(
    names: Iterable[str], prefix: str, alone: bool
) -> tuple[dict[str, str], dict[str, str]]:
    """({name in a converted file: name here}, the same of what a wrapper adds to its backbone).

    A backbone's stages lie under ``prefix``, or, C4's res5, in the RoI heads. What lies beside it
    within an FPN or the like is the wrapper's; beside a detector's backbone are its heads.
    """
    names = [name for name in names if not name.endswith("num_batches_tracked")]
    body = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
    outer = prefix.rstrip(".").rpartition(".")[0]
    pyramid: dict[str, str] = {}
    if prefix and (outer or alone):
        outer += "." if outer else ""
        beside = [n for n in names if n.startswith(outer) and not n.startswith(prefix)]
        pyramid = {name.removeprefix(outer): name for name in beside}
    for name in names:
        if name.startswith("roi_heads.res5."):
            body[name.removeprefix("roi_heads.")] = name
    return body, pyramid


def _features(
    module: nn.Module,
    prefix: str,
    arrays: Mapping[str, np.ndarray],
    metadata: WeightsMetadata,
    input_format: str,
) -> dict[str, torch.Tensor]:
    """What the backbone in ``module`` would make of the fixed picture with ``arrays``.

    {} where it does not run on a picture of the pre-training's size; the log says why.
    """
    network = metadata.network or {}
    if not network["features"]:
        return {}
    body = fill(copy.deepcopy(module.get_submodule(prefix[:-1])), arrays)
    head = copy.deepcopy(getattr(getattr(module, "roi_heads", None), "res5", None))
    if head is not None:
        fill(head, {n.removeprefix("res5."): a for n, a in arrays.items() if n.startswith("res5.")})
    form = input_format or getattr(module, "input_format", None) or metadata.input_format
    image = picture(*network["picture"], form, network["input_channels"])
    source = module if hasattr(module, "pixel_mean") and hasattr(module, "pixel_std") else metadata
    try:
        return compute_features(body, normalise(image, source), head)
    except Exception as error:  # a backbone of anyone's
        logger.warning(
            "the network does not run on a picture of %dx%d pixels (%s): what it computes is not "
            "compared with the pre-training",
            *(*network["picture"], f"{type(error).__name__}: {error}".splitlines()[0]),
        )
        return {}


def _other_features(features: Mapping[str, torch.Tensor], network: Mapping[str, Any]) -> list[str]:
    """The features that are not those of the pre-training."""
    said = {name: value for name, value in network["features"].items() if name in features}
    strided = {n: v["shape"] for n, v in said.items() if list(features[n].shape[1:]) != v["shape"]}
    for name, shape in strided.items():  # a dilated res5 does so, which is a detector's choice
        logger.warning(
            "%s has another stride than in the pre-training (shape %s, not %s): not compared",
            *(name, list(features[name].shape[1:]), shape),
        )
    apart = {n: difference(v, features[n]) for n, v in said.items() if n not in strided}
    if features and not apart:
        logger.warning("no feature of the pre-training's is an output here: none was compared")
    return [f"{n}: {100 * d:.2g} % of its norm apart" for n, d in apart.items() if d > TOLERANCE]


def _reasons(file: Shapes, network: Shapes, module: nn.Module) -> list[str]:
    """In a config's words, why tensors do not fit, and what helps; [] where that is not known."""
    has_c4_head = hasattr(getattr(module, "roi_heads", None), "res5")
    try:
        said = read_architecture(file)
    except WeightsError:
        text = (
            "a C4 detector ends in a res5 of Detectron2's ResNet, which the file has not: choose "
        )
        return [text + "an FPN config"] if has_c4_head else []
    if said["depth"] in (18, 34) and has_c4_head:
        return ["Detectron2's C4 detectors have no basic blocks, as depth 18 and 34: choose FPN"]
    try:
        found = read_architecture(network)
    except WeightsError:
        return []
    lines = []
    for key in sorted(said.keys() & found.keys()):
        if said[key] != found[key]:
            helps = "finetune_net.py --match-architecture takes it from the weights"
            if key == "deform_on_per_stage" and not any(said[key]):
                helps = "MODEL.JIGSAW.NEW_OFFSETS True starts the offsets at zero"
            values = f"file {said[key] or 'none'}, network {found[key] or 'none'}"
            lines.append(f"MODEL.RESNETS.{key.upper()}: {values}; {helps}")
    return lines


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
    done["stride_in_1x1"] = strides_in_1x1(module)
    for block in module.modules():
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
    if report.interpolated:
        names = ", ".join(report.interpolated)
        logger.warning(
            "position embeddings interpolated to the network's grid, as ViTDet does: %s; its "
            "features then differ and are not compared with the pre-training's",
            names,
        )
    if report.new_outputs:
        names = ", ".join(report.new_outputs)
        logger.warning("new, for outputs that the pre-training did not use: %s", names)
    if report.new_offsets:
        logger.info("%d offsets of deformable stages start at zero", len(report.new_offsets))
    if report.new_modules:
        level = logging.WARNING if alone else logging.INFO  # a detector's heads are always new
        logger.log(level, "new, with random weights: %s", ", ".join(report.new_modules))

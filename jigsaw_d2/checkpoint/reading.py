"""Backbone and metadata of any file that we read.

These are our checkpoints (mid-training too) or the folder of a run, files already converted, and
the ImageNet files of torchvision and of MSRA (Caffe2).
"""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.modeling.backbone import ResNet

from jigsaw_d2.checkpoint.formats import (
    RESNET_NAME,
    from_msra,
    from_torchvision,
    keep_resnet,
    name_from_torchvision,
)
from jigsaw_d2.checkpoint.metadata import (
    Architecture,
    WeightsMetadata,
    check_architecture,
    norm_family,
    read_architecture,
)
from jigsaw_d2.checkpoint.network import (
    build_pretrained,
    deformable_kind,
    describe,
    strides_in_1x1,
)
from jigsaw_d2.checkpoint.weight_files import Arrays, read_weights, shapes_of, to_array
from jigsaw_d2.config import AUTO_NORM, get_jigsaw_cfg
from jigsaw_d2.config_files import import_kept, refuse_program
from jigsaw_d2.io import CheckpointError, ConfigError, WeightsError

logger = logging.getLogger(__name__)

METADATA_KEY = "jigsaw_metadata"
_OLD_METADATA_KEY = "jigsaw_passport"  # version 1 of this software
# Of what Detectron2's FPN adds to its bottom-up network.
PYRAMID_NAME = re.compile(r"(fpn_(lateral|output)\d|top_block)\.")
# Among a converted file's tensors: one of no network, whose name Detectron2's own loading warns of,
# so that it at least says what it does not check.
NOTE = "these weights need "
_HEADS = ("proposal_generator.", "roi_heads.", "head.")  # of a detector of Detectron2's


def read_backbone(path: str | Path, trust: bool = False) -> tuple[Arrays, WeightsMetadata]:
    """Backbone, float32 arrays of any shapes by name, and metadata of any file that we read.

    Raises:
        CheckpointError: a file that is missing, damaged, altered, of another kind, or that could
            run code.
        WeightsError: tensors that are not finite, or not those that the metadata describes.
    """
    arrays, metadata = read_tensors(path, trust)
    if metadata is None:
        raise CheckpointError(
            f"{path}: no checkpoint that can be converted; found {len(arrays)} tensors "
            f"({', '.join(list(arrays)[:5])}, ...); expected a checkpoint of Jigsaw pre-training "
            "(keys model and jigsaw), a converted file, a state dict of a torchvision ResNet, or "
            "MSRA's R-50.pkl or R-101.pkl"
        )
    return arrays, metadata


def read_converted(path: str | Path) -> tuple[Arrays, WeightsMetadata]:
    """``read_backbone`` for a converted file alone, whose digest vouches for both."""
    arrays, metadata = read_tensors(path)
    if metadata is None or not metadata.digest:
        raise CheckpointError(
            f"{path}: weights without metadata; make such with convert_weights.py --input {path} "
            "--output ..."
        )
    return arrays, metadata


def read_tensors(path: str | Path, trust: bool = False) -> tuple[Arrays, WeightsMetadata | None]:
    """As ``read_backbone``; of another model's file all tensors as they are named, and None."""
    path = Path(path)
    if path.is_dir():
        marker = path / "last_checkpoint"
        if not marker.is_file():
            raise CheckpointError(f"{path}: a folder without last_checkpoint; name a checkpoint")
        path /= marker.read_text().strip()
    data = read_weights(path, trust)
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{path}: no weights; found a {type(data).__name__}")
    for place in (data, getattr(data, "_metadata", {})):
        for key in (METADATA_KEY, _OLD_METADATA_KEY):
            if key in place:
                return _open_converted(path, data, place[key])
    if "jigsaw" in data and "model" in data:
        arrays, metadata, cfg = _from_training(data, str(path), trust)
    else:
        tensors = data
        for wrapping in ("model", "state_dict", "blobs"):
            if isinstance(tensors.get(wrapping), Mapping):
                tensors = tensors[wrapping]
        tensors = _without_prefix(path, tensors)
        if {"conv1_w", "res2_0_branch2a_w"} <= set(tensors):
            arrays, metadata = from_msra(tensors)
        elif data.get("__author__") == "torchvision" or "layer1.0.conv1.weight" in tensors:
            arrays, metadata = from_torchvision(tensors)
        else:
            held = {n: v for n, v in tensors.items() if isinstance(v, (np.ndarray, torch.Tensor))}
            return {name: to_array(value) for name, value in held.items()}, None
        logger.info("%s: read as ImageNet weights, input %s", path, metadata.input_format)
        cfg = get_jigsaw_cfg()
        for key, value in metadata.architecture.required_config().items():
            cfg.merge_from_list([key, value])
        cfg.MODEL.RESNETS.NORM = metadata.architecture.norm
        cfg.MODEL.RESNETS.STRIDE_IN_1X1 = metadata.architecture.stride_in_1x1
    _check_tensors(path, arrays, metadata)
    if not metadata.network:
        backbone = build_pretrained(cfg, arrays)
        if isinstance(backbone, ResNet) and not metadata.architecture.is_resnet:
            metadata = _known_resnet(metadata, cfg, arrays, backbone)
        metadata = replace(metadata, network=describe(backbone, metadata, cfg))
    return arrays, metadata


def is_detector(names: Iterable[str]) -> bool:
    """Whether tensors of these names are of a backbone with heads behind it."""
    names = [*names]
    return all(any(n.startswith(part) for n in names) for part in ("backbone.", _HEADS))


def metadata_path(weights: str | Path) -> Path:
    """Where the YAML beside a weight file is: ``weights.pkl`` -> ``weights.pkl.yaml``."""
    return Path(weights).with_name(Path(weights).name + ".yaml")


def _open_converted(
    path: Path, data: Mapping[str, Any], values: Any
) -> tuple[Arrays, WeightsMetadata]:
    metadata, beside = WeightsMetadata.from_dict(values, str(path)), metadata_path(path)
    if "model" in data:
        held = {n: value for n, value in data["model"].items() if not n.startswith(NOTE)}
        arrays = {name: to_array(value) for name, value in held.items()}
    else:
        arrays = keep_resnet({name_from_torchvision(name): value for name, value in data.items()})
    if beside.is_file() and metadata != WeightsMetadata.from_yaml(beside.read_text(), str(beside)):
        raise CheckpointError(
            f"{path} and {beside.name} say different things; convert the checkpoint again, or "
            "remove the YAML"
        )
    _check_tensors(path, arrays, metadata)
    if metadata.sealed(arrays) != metadata:
        raise CheckpointError(
            f"{path}: metadata or tensors were changed after they were written (the digest is "
            "another one); convert the checkpoint again"
        )
    return arrays, metadata


def _from_training(
    data: Mapping[str, Any], where: str, trust: bool
) -> tuple[Arrays, WeightsMetadata, CfgNode]:
    """From what the trainer writes; classifier, ERF and the norms' counters are left out.

    So are the norms that ``set_aside_unused`` has set aside. The network at the bottom of a pyramid
    is named as it is by itself. Also the config of that training.
    """
    record = data["jigsaw"]
    names = record.get("set_aside", ()) if isinstance(record, Mapping) else ()
    aside = {name.rpartition(".")[0] for name in names}
    arrays = {
        name.removeprefix("backbone.").removeprefix("bottom_up."): to_array(value)
        for name, value in data["model"].items()
        if name.startswith("backbone.") and not name.endswith("num_batches_tracked")
        if name.rpartition(".")[0] not in aside
    }
    try:
        config = yaml.safe_load(record["config"])
        model, inputs, store = config["MODEL"], config["INPUT"], record["store"]
        import_kept(config, where, trust)
        cfg = get_jigsaw_cfg()
        cfg.set_new_allowed(True)  # keys of a module of --register
        cfg.merge_from_other_cfg(CfgNode(config))
        refuse_program(cfg, where, trust=trust)
        template = inputs["JIGSAW"]["TEMPLATE_SIZE"], inputs["JIGSAW"]["TEMPLATE_SPLIT"]
        metadata = WeightsMetadata(
            origin="jigsaw",
            architecture=Architecture.from_config(model),
            input_format=inputs["FORMAT"],
            pixel_mean=tuple(float(v) for v in model["PIXEL_MEAN"]),
            pixel_std=tuple(float(v) for v in model["PIXEL_STD"]),
            categories=tuple(store["categories"]),
            template={k: [int(v) for v in yx] for k, yx in zip(("size", "split"), template)},
            objective=str(model["JIGSAW"]["OBJECTIVE"]),
            tau=float(model["JIGSAW"]["TAU"]),
            iterations=int(data["iteration"]) + 1,
            images_seen=int(record["images_seen"]),
            dataset=str(store["dataset"]),
            dataset_hash=str(store["image_ids_hash"]),
            code_version=str(record["code_version"]),
            levels=_levels(model, arrays),
        )
    except ConfigError:
        raise
    except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{where}: the checkpoint lacks what the metadata is made of ({error!r}); was it "
            "written by train_net.py?"
        ) from None
    architecture = metadata.architecture
    parts = (RESNET_NAME, PYRAMID_NAME)
    stray = [name for name in arrays if not any(part.match(name) for part in parts)]
    if architecture.is_resnet and stray:
        raise WeightsError(f"{where}: the ResNet holds tensors of no stage: {stray[:4]}")
    if architecture.norm == AUTO_NORM:  # chosen when training started
        norm = read_architecture(shapes_of(arrays))["norm"]
        metadata = replace(metadata, architecture=replace(architecture, norm=norm))
    return arrays, metadata, cfg


def _levels(model: Mapping[str, Any], arrays: Arrays) -> dict[str, Any] | None:
    """``WeightsMetadata.levels`` from the MODEL node of a pre-training's config."""
    trained = list(model["JIGSAW"].get("IN_FEATURES", ())) or [model["JIGSAW"]["IN_FEATURE"]]
    if any(PYRAMID_NAME.match(name) for name in arrays):
        fpn = model["FPN"]
        pyramid = {"norm": norm_family(fpn["NORM"]), "fuse_type": fpn["FUSE_TYPE"]}
        return {"trained": trained, **pyramid, "out_channels": int(fpn["OUT_CHANNELS"])}
    return {"trained": trained} if len(trained) > 1 else None


def _without_prefix(path: Path, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """A ResNet's tensors by torchvision's names, of a file that has them within another module.

    Raises:
        CheckpointError: of several ResNets, such as a teacher and its student.
    """
    known = "layer1.0.conv1.weight"
    prefixes = [name.removesuffix(known) for name in tensors if name.endswith("." + known)]
    if is_detector(tensors):  # on a ResNet of timm's or torchvision's
        prefixes = [p for p in prefixes if p not in ("backbone.net.", "backbone.bottom_up.net.")]
    if len(prefixes) > 1:
        raise CheckpointError(
            f"{path}: holds several ResNets ({', '.join(prefixes)}); leave the tensors of one in it"
        )
    if not prefixes:
        return tensors
    kept = {n.removeprefix(p): v for p in prefixes for n, v in tensors.items() if n.startswith(p)}
    logger.info(
        "%s: read without %s in the names, and without %d tensors of other parts",
        *(path, prefixes[0], len(tensors) - len(kept)),
    )
    return kept


def _known_resnet(
    metadata: WeightsMetadata, cfg: CfgNode, arrays: Arrays, backbone: ResNet
) -> WeightsMetadata:
    """With the keys of MODEL.RESNETS, if a builder of another name has built by them.

    A LazyConfig has its own, which are seen on its ``backbone``.
    """
    architecture = Architecture.from_config(cfg.MODEL, is_resnet=True)
    try:
        found = read_architecture(shapes_of(arrays))
        if cfg.MODEL.JIGSAW.BACKBONE_FROM:
            seen = {"stride_in_1x1": bool(strides_in_1x1(backbone)), **deformable_kind(backbone)}
            architecture = replace(architecture, **found, **seen)
        elif architecture.norm == AUTO_NORM:
            architecture = replace(architecture, norm=found["norm"])
        check_architecture(architecture, shapes_of(arrays))
    except WeightsError as error:
        logger.warning("%s does not follow MODEL.RESNETS: %s", architecture.backbone, error)
        return metadata
    return replace(metadata, architecture=architecture)


def _check_tensors(path: Path, arrays: Arrays, metadata: WeightsMetadata) -> None:
    if not arrays:
        raise WeightsError(f"{path}: no tensors of a backbone")
    broken = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if broken:
        raise WeightsError(
            f"{path}: {len(broken)} tensors hold NaN or infinity, the first is {broken[0]}; "
            "the training diverged: take an earlier checkpoint"
        )
    check_architecture(metadata.architecture, shapes_of(arrays))

"""From a checkpoint to weights that a detector or torchvision loads, with their metadata.

Read are our checkpoints (mid-training too) or the folder of a run, files already converted, and the
ImageNet files of torchvision and of MSRA (Caffe2). Inside, tensors have Detectron2's names without
prefix: stem.conv1.weight, res2.0.conv1.norm.weight, ...
"""

import logging
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names
from detectron2.config import CfgNode
from detectron2.modeling.backbone import ResNet

from jigsaw_d2.checkpoint.metadata import (
    Architecture,
    WeightsMetadata,
    check_architecture,
    norm_family,
    read_architecture,
)
from jigsaw_d2.checkpoint.network import build_pretrained, describe, strides_in_1x1
from jigsaw_d2.checkpoint.plain_formats import to_module, to_timm
from jigsaw_d2.config import AUTO_NORM, admit_programs, get_jigsaw_cfg
from jigsaw_d2.io import CheckpointError, ConfigError, WeightsError, open_atomically, write_text

logger = logging.getLogger(__name__)

FORMATS = ("detectron2", "torchvision", "timm", "state_dict")
METADATA_KEY = "jigsaw_metadata"
_OLD_METADATA_KEY = "jigsaw_passport"  # version 1 of this software
# Names of a ResNet's tensors. Of the stem only its convolution: Detectron2's converter of
# torchvision's files leaves a stray stem.fc there.
_RESNET_NAME = re.compile(r"(stem\.conv1|res[2-5]\.\d+)\.")
# Of what Detectron2's FPN adds to its bottom-up network.
_PYRAMID_NAME = re.compile(r"(fpn_(lateral|output)\d|top_block)\.")
# 255 x the constants of torchvision's ImageNet training, RGB.
_TORCHVISION_INPUT = ("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
# MSRA's networks see BGR pixels with the mean taken off and no division, as FAIR's with group norm
# do; FAIR's ResNeXt-101 divides. Only MSRA's stride in the 1x1. (Detectron2's zoo configs.)
_MSRA_INPUT = ("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0))
_FAIR_X101_INPUT = ("BGR", (103.53, 116.28, 123.675), (57.375, 57.12, 58.395))
# Among a converted file's tensors: one of no network, whose name Detectron2's own loading warns of,
# so that it at least says what it does not check.
NOTE = "these weights need "
Arrays = dict[str, np.ndarray]


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
        path: see the head of this file; a folder stands for the file its ``last_checkpoint`` names.
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
    if format == "torchvision" and metadata.levels:
        count = len(arrays)
        arrays = {n: array for n, array in arrays.items() if not _PYRAMID_NAME.match(n)}
        metadata = replace(metadata, levels=None)
        logger.info("torchvision's network is no pyramid: left out %d tensors", count - len(arrays))
    metadata = metadata.sealed(arrays)
    values = metadata.to_dict()
    contents: Mapping[str, Any]
    if format == "timm" and not metadata.architecture.is_resnet:
        contents = to_timm(arrays, metadata)
    elif format == "state_dict":
        contents = to_module(arrays)
    elif format in ("torchvision", "timm"):  # timm's ResNets have torchvision's names
        contents = to_torchvision(arrays, metadata.architecture)
        # load_state_dict looks here for module names alone; so the metadata is no stray key
        contents._metadata = {METADATA_KEY: values}
    else:
        as_stored = torch.from_numpy if output.suffix == ".pth" else np.asarray
        model = {name: as_stored(array) for name, array in arrays.items()}
        model[metadata_note(metadata)] = as_stored(np.zeros(0, np.float32))
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


def metadata_path(weights: str | Path) -> Path:
    """Where the YAML beside a weight file is: ``weights.pkl`` -> ``weights.pkl.yaml``."""
    return Path(weights).with_name(Path(weights).name + ".yaml")


def metadata_note(metadata: WeightsMetadata) -> str:
    """The name under which a converted file says what it requires; see ``NOTE``."""
    values = (f"{key} {value}" for key, value in metadata.required_config().items())
    return NOTE + ", ".join(values)


def check_free(path: str | Path, force: bool) -> None:
    """Raise ``ConfigError`` if ``path`` exists and must not be replaced."""
    if Path(path).exists() and not force:
        raise ConfigError(f"{path} exists; --force replaces it")


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


def read_converted(path: str | Path, trust: bool = False) -> tuple[Arrays, WeightsMetadata]:
    """``read_backbone`` for a converted file alone, whose digest vouches for both."""
    arrays, metadata = read_tensors(path, trust)
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
            return {name: _array(value) for name, value in held.items()}, None
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


def _without_prefix(path: Path, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """A ResNet's tensors by torchvision's names, of a file that has them within another module.

    Raises:
        CheckpointError: of several ResNets, such as a teacher and its student.
    """
    known = "layer1.0.conv1.weight"
    prefixes = [name.removesuffix(known) for name in tensors if name.endswith("." + known)]
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
        found = read_architecture(_shapes(arrays))
        if cfg.MODEL.JIGSAW.BACKBONE_FROM:
            stride = bool(strides_in_1x1(backbone))
            architecture = replace(architecture, **found, stride_in_1x1=stride)
        elif architecture.norm == AUTO_NORM:
            architecture = replace(architecture, norm=found["norm"])
        check_architecture(architecture, _shapes(arrays))
    except WeightsError as error:
        logger.warning("%s does not follow MODEL.RESNETS: %s", architecture.backbone, error)
        return metadata
    return replace(metadata, architecture=architecture)


def _from_training(
    data: Mapping[str, Any], where: str, trust: bool
) -> tuple[Arrays, WeightsMetadata, CfgNode]:
    """From what the trainer writes; classifier, ERF and the norms' counters are left out.

    The network at the bottom of a pyramid is named as it is by itself. Also the config of that
    training.
    """
    arrays = {
        name.removeprefix("backbone.").removeprefix("bottom_up."): _array(value)
        for name, value in data["model"].items()
        if name.startswith("backbone.") and not name.endswith("num_batches_tracked")
    }
    try:
        record = data["jigsaw"]
        config = yaml.safe_load(record["config"])
        model, inputs, store = config["MODEL"], config["INPUT"], record["store"]
        cfg = get_jigsaw_cfg()
        cfg.set_new_allowed(True)  # keys of a module of --register
        cfg.merge_from_other_cfg(CfgNode(config))
        admit_programs(cfg, where, trust=trust)
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
    parts = (_RESNET_NAME, _PYRAMID_NAME)
    stray = [name for name in arrays if not any(part.match(name) for part in parts)]
    if architecture.is_resnet and stray:
        raise WeightsError(f"{where}: the ResNet holds tensors of no stage: {stray[:4]}")
    if architecture.norm == AUTO_NORM:  # chosen when training started
        norm = read_architecture(_shapes(arrays))["norm"]
        metadata = replace(metadata, architecture=replace(architecture, norm=norm))
    return arrays, metadata, cfg


def _levels(model: Mapping[str, Any], arrays: Arrays) -> dict[str, Any] | None:
    """``WeightsMetadata.levels`` from the MODEL node of a pre-training's config."""
    trained = list(model["JIGSAW"].get("IN_FEATURES", ())) or [model["JIGSAW"]["IN_FEATURE"]]
    if any(_PYRAMID_NAME.match(name) for name in arrays):
        fpn = model["FPN"]
        pyramid = {"norm": norm_family(fpn["NORM"]), "fuse_type": fpn["FUSE_TYPE"]}
        return {"trained": trained, **pyramid, "out_channels": int(fpn["OUT_CHANNELS"])}
    return {"trained": trained} if len(trained) > 1 else None


def from_torchvision(tensors: Mapping[str, Any]) -> tuple[Arrays, WeightsMetadata]:
    """Arrays of any shapes under our names, and the metadata of torchvision's ImageNet training."""
    renamed = {name_from_torchvision(name): value for name, value in tensors.items()}
    return _from_imagenet(renamed, _TORCHVISION_INPUT, stride_in_1x1=False)


def from_msra(tensors: Mapping[str, Any]) -> tuple[Arrays, WeightsMetadata]:
    """As ``from_torchvision`` of Caffe2's form: MSRA's, and FAIR's with group norm or groups.

    A batch norm of scale and shift alone gets the statistics with which it is just that.
    """
    names = [name for name in tensors if not name.endswith("_momentum")]
    renamed = dict(zip(convert_basic_c2_names(names), (tensors[name] for name in names)))
    has_group_norm = any("_gn_" in name for name in names)
    for name in [n for n in renamed if n.endswith("norm.weight") and not has_group_norm]:
        prefix, zeros = name.removesuffix("weight"), np.zeros_like(renamed[name])
        renamed.setdefault(prefix + "running_mean", zeros)
        renamed.setdefault(prefix + "running_var", zeros + np.float32(1 - 1e-5))
    said = read_architecture(_shapes(_keep_resnet(renamed)))
    inputs = _FAIR_X101_INPUT if (said["num_groups"], said["depth"]) == (32, 101) else _MSRA_INPUT
    is_msra = said["num_groups"] == 1 and not has_group_norm
    return _from_imagenet(renamed, inputs, stride_in_1x1=is_msra)


def _from_imagenet(
    tensors: Mapping[str, Any], inputs: tuple[str, tuple, tuple], stride_in_1x1: bool
) -> tuple[Arrays, WeightsMetadata]:
    arrays = _keep_resnet(tensors)
    channels = arrays["stem.conv1.weight"].shape[1] if "stem.conv1.weight" in arrays else 3
    if channels != len(inputs[1]):
        raise WeightsError(
            f"conv1 sees {channels} channels; the mean and std that go with such a file are "
            f"ImageNet's, of {len(inputs[1])}: only the checkpoint of a pre-training with "
            f"INPUT.FORMAT C{channels} says those of other channels"
        )
    architecture = Architecture(
        **{"width_per_group": 64, **read_architecture(_shapes(arrays))},
        stride_in_1x1=stride_in_1x1,
        deform_modulated=False,
        deform_num_groups=1,
    )
    return arrays, WeightsMetadata("imagenet", architecture, *inputs, dataset="ImageNet-1k")


def _keep_resnet(tensors: Mapping[str, Any]) -> Arrays:
    return {
        name: _array(value)
        for name, value in tensors.items()
        if _RESNET_NAME.match(name) and not name.endswith("num_batches_tracked")
    }


def name_from_torchvision(name: str) -> str:
    """ "layer1.0.downsample.1.weight" -> "res2.0.shortcut.norm.weight"; "fc.*" stays."""
    stage = re.match(r"layer([1-4])\.(.*)", name)
    if stage:
        name = f"res{int(stage[1]) + 1}.{stage[2]}"
    elif name.startswith(("conv1.", "bn1.")):
        name = "stem." + name
    name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    return re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)


def name_to_torchvision(name: str) -> str:
    """The reverse of ``name_from_torchvision``."""
    name = re.sub(r"\bconv(\d)\.norm\.", r"bn\1.", name)
    name = name.replace("shortcut.norm.", "downsample.1.").replace("shortcut.", "downsample.0.")
    stage = re.match(r"res([2-5])\.(.*)", name)
    return f"layer{int(stage[1]) - 1}.{stage[2]}" if stage else name.removeprefix("stem.")


def to_torchvision(arrays: Mapping[str, np.ndarray], architecture: Architecture) -> OrderedDict:
    """A state dict, tensors of any shapes, that the torchvision network loads with strict=True.

    The classifier ``fc``, which strict loading asks for, is zeros of shape (1000, C).

    Raises:
        WeightsError: torchvision has no such network; says which key is in the way.
    """
    basic = architecture.depth in (18, 34)
    theirs = {
        "backbone": architecture.backbone if architecture.is_resnet else None,
        "norm": "BN",
        "deform_on_per_stage": (False,) * 4,
        "stride_in_1x1": architecture.stride_in_1x1 if basic else False,  # there is no 1x1
        "input_channels": 3,
        "stem_out_channels": 64,
        "res2_out_channels": 64 if basic else 256,
    }
    ours = {**vars(architecture), "input_channels": 3}
    if "stem.conv1.weight" in arrays:
        ours["input_channels"] = arrays["stem.conv1.weight"].shape[1]
    for key, value in theirs.items():
        if ours[key] != value:
            raise WeightsError(
                f"torchvision has no such network: {key} is {ours[key]}; "
                "write the Detectron2 format instead"
            )
    state: OrderedDict = OrderedDict()
    for name, array in arrays.items():
        state[name_to_torchvision(name)] = torch.from_numpy(np.array(array))
        if name.endswith("running_var"):
            counter = name_to_torchvision(name).replace("running_var", "num_batches_tracked")
            state[counter] = torch.zeros((), dtype=torch.long)
    last = max(name for name in arrays if re.fullmatch(r"res5\.\d+\.conv\d\.weight", name))
    state["fc.weight"] = torch.zeros(1000, arrays[last].shape[0])
    state["fc.bias"] = torch.zeros(1000)
    return state


def _open_converted(
    path: Path, data: Mapping[str, Any], values: Any
) -> tuple[Arrays, WeightsMetadata]:
    metadata, beside = WeightsMetadata.from_dict(values, str(path)), metadata_path(path)
    if "model" in data:
        held = {n: value for n, value in data["model"].items() if not n.startswith(NOTE)}
        arrays = {name: _array(value) for name, value in held.items()}
    else:
        arrays = _keep_resnet({name_from_torchvision(name): value for name, value in data.items()})
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


def _check_tensors(path: Path, arrays: Arrays, metadata: WeightsMetadata) -> None:
    if not arrays:
        raise WeightsError(f"{path}: no tensors of a backbone")
    broken = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if broken:
        raise WeightsError(
            f"{path}: {len(broken)} tensors hold NaN or infinity, the first is {broken[0]}; "
            "the training diverged: take an earlier checkpoint"
        )
    check_architecture(metadata.architecture, _shapes(arrays))


def _shapes(arrays: Arrays) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}


def _array(value: Any) -> np.ndarray:
    """Float32 copy, contiguous."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().float().numpy()
    return np.array(value, dtype=np.float32, order="C")


_PICKLED = {
    ("_codecs", "encode"): str.encode,  # pickles of protocol 2 call it to spell bytes
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
    ("multiarray", "scalar"): np._core.multiarray.scalar,
    ("numeric", "_frombuffer"): np._core.numeric._frombuffer,
}
# How our unpickler words a refusal, and how torch's does.
_REFUSALS = ("it holds", "Unsupported global", "Unsupported class")


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numbers, text, containers and numpy arrays; refuses every other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        found = _PICKLED.get((re.sub(r"^numpy\._?core\.", "", module), name))
        if found is None:
            raise pickle.UnpicklingError(f"{_REFUSALS[0]} {module}.{name}")
        return found


def read_weights(path: str | Path, trust: bool = False) -> Any:
    """The object in a ``.pkl`` (numpy arrays) or a torch file (any other name, tensors on the CPU).

    Args:
        trust: unpickle anything, which may run code from the file. Only for files of your own.

    Raises:
        CheckpointError: no such file, a damaged one, or more than tensors, arrays, plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        if path.suffix != ".pkl":
            return torch.load(path, map_location="cpu", weights_only=not trust)
        with open(path, "rb") as stream:
            unpickler = pickle.Unpickler if trust else _ArrayUnpickler
            return unpickler(stream, encoding="latin1").load()
    except Exception as error:  # unpicklers raise anything over bytes that are no pickle
        # Torch's errors are often a page long; what matters is one sentence.
        text = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
        reason = text.splitlines()[0].split(". ")[0][:160]
        if any(refusal in str(error) for refusal in _REFUSALS):
            raise CheckpointError(
                f"{path}: refused, because reading it could run code from it ({reason}); expected "
                "tensors or arrays and plain values only. If the file is your own, --trust reads it"
            ) from None
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as weights ({reason}); is it "
            "truncated, or another kind of file?"
        ) from None

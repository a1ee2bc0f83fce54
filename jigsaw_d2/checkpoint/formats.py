"""Names of others: ResNets of torchvision and MSRA (Caffe2), networks of timm, bare modules.

Ours are Detectron2's without prefix: stem.conv1.weight, res2.0.conv1.norm.weight, ...
"""

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names

from jigsaw_d2.checkpoint.metadata import Architecture, WeightsMetadata, read_architecture
from jigsaw_d2.checkpoint.weight_files import Arrays, shapes_of, to_array
from jigsaw_d2.io import WeightsError
from jigsaw_d2.modeling.backbones import import_library

# Names of a ResNet's tensors. Of the stem only its convolution: Detectron2's converter of
# torchvision's files leaves a stray stem.fc there.
RESNET_NAME = re.compile(r"(stem\.conv1|res[2-5]\.\d+)\.")
# 255 x the constants of torchvision's ImageNet training, RGB.
_TORCHVISION_INPUT = ("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
# MSRA's networks see BGR pixels with the mean taken off and no division, as FAIR's with group norm
# do; FAIR's ResNeXt-101 divides. Only MSRA's stride in the 1x1. (Detectron2's zoo configs.)
_MSRA_INPUT = ("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0))
_FAIR_X101_INPUT = ("BGR", (103.53, 116.28, 123.675), (57.375, 57.12, 58.395))


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
    said = read_architecture(shapes_of(keep_resnet(renamed)))
    inputs = _FAIR_X101_INPUT if (said["num_groups"], said["depth"]) == (32, 101) else _MSRA_INPUT
    is_msra = said["num_groups"] == 1 and not has_group_norm
    return _from_imagenet(renamed, inputs, stride_in_1x1=is_msra)


def _from_imagenet(
    tensors: Mapping[str, Any], inputs: tuple[str, tuple, tuple], stride_in_1x1: bool
) -> tuple[Arrays, WeightsMetadata]:
    arrays = keep_resnet(tensors)
    channels = arrays["stem.conv1.weight"].shape[1] if "stem.conv1.weight" in arrays else 3
    if channels != len(inputs[1]):
        raise WeightsError(
            f"conv1 sees {channels} channels; the mean and std that go with such a file are "
            f"ImageNet's, of {len(inputs[1])}: only the checkpoint of a pre-training with "
            f"INPUT.FORMAT C{channels} says those of other channels"
        )
    architecture = Architecture(
        **{"width_per_group": 64, **read_architecture(shapes_of(arrays))},
        stride_in_1x1=stride_in_1x1,
        deform_modulated=False,
        deform_num_groups=1,
    )
    return arrays, WeightsMetadata("imagenet", architecture, *inputs, dataset="ImageNet-1k")


def keep_resnet(tensors: Mapping[str, Any]) -> Arrays:
    """Those of a ResNet, of any shapes, by our names; without a classifier and norms' counters."""
    return {
        name: to_array(value)
        for name, value in tensors.items()
        if RESNET_NAME.match(name) and not name.endswith("num_batches_tracked")
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

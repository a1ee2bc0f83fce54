"""Names of the same ResNet tensors elsewhere: torchvision's, and MSRA's (Caffe2), to ours and back.

Ours are Detectron2's without prefix: stem.conv1.weight, stem.conv1.norm.weight, res2.0.conv1....
"""

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names

from jigsaw_d2.weights.architecture import Architecture, ArchitectureError, read_architecture
from jigsaw_d2.weights.passport import Passport

# Names of a ResNet's tensors. Of the stem only its convolution: Detectron2's converter of such
# files leaves a stray stem.fc there.
RESNET_NAME = re.compile(r"(stem\.conv1|res[2-5]\.\d+)\.")
# 255 x the constants of torchvision's ImageNet training, RGB.
TORCHVISION_MEAN = (123.675, 116.28, 103.53)
TORCHVISION_STD = (58.395, 57.12, 57.375)
# MSRA's networks see BGR pixels with the mean taken off and no division.
MSRA_MEAN = (103.53, 116.28, 123.675)
MSRA_STD = (1.0, 1.0, 1.0)
TORCHVISION_CLASSES = 1000
# (depth, groups, width per group) of the networks whose state dicts torchvision can load.
_TORCHVISION_NAMES = {
    (18, 1, 64): "resnet18",
    (34, 1, 64): "resnet34",
    (50, 1, 64): "resnet50",
    (101, 1, 64): "resnet101",
    (152, 1, 64): "resnet152",
    (50, 32, 4): "resnext50_32x4d",
    (101, 32, 4): "resnext101_32x4d",
    (101, 32, 8): "resnext101_32x8d",
    (101, 64, 4): "resnext101_64x4d",
}
Arrays = dict[str, np.ndarray]


def is_torchvision(names: set[str], author: str = "") -> bool:
    """Whether these are the names of a torchvision ResNet's state dict, or renamed from one.

    Args:
        author: what a file of Detectron2's own converter says it was made from.
    """
    return (
        author == "torchvision" or {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight"} <= names
    )


def is_msra(names: set[str]) -> bool:
    """Whether these are Caffe2's names of a ResNet, as in MSRA's R-50.pkl and R-101.pkl."""
    return {"conv1_w", "res2_0_branch2a_w"} <= names


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


def from_torchvision(tensors: Mapping[str, Any]) -> tuple[Arrays, Passport]:
    """Arrays under our names, and the passport of torchvision's ImageNet training.

    Raises:
        ArchitectureError: no ResNet or ResNeXt.
    """
    renamed = {name_from_torchvision(name): value for name, value in tensors.items()}
    arrays = keep_resnet(renamed)
    return arrays, _imagenet_passport(arrays, "RGB", TORCHVISION_MEAN, TORCHVISION_STD, False)


def from_msra(tensors: Mapping[str, Any]) -> tuple[Arrays, Passport]:
    """Arrays under our names, and the passport of MSRA's networks: BGR, std 1, stride in the 1x1.

    Files with only scale and shift of each batch norm get the statistics under which
    ``FrozenBatchNorm2d`` is exactly that scale and shift.

    Raises:
        ArchitectureError: no ResNet.
    """
    names = [name for name in tensors if not name.endswith("_momentum")]
    renamed = dict(zip(convert_basic_c2_names(names), (tensors[name] for name in names)))
    arrays = keep_resnet(renamed)
    for name in [n for n in arrays if n.endswith("norm.weight")]:
        prefix = name.removesuffix("weight")
        zeros = np.zeros_like(arrays[name])
        arrays.setdefault(prefix + "running_mean", zeros)
        arrays.setdefault(prefix + "running_var", zeros + np.float32(1 - 1e-5))
    return arrays, _imagenet_passport(arrays, "BGR", MSRA_MEAN, MSRA_STD, True)


def keep_resnet(tensors: Mapping[str, Any]) -> Arrays:
    """Only stem and stages, as float32 arrays; the counters of batch norm are left out."""
    return {
        name: to_array(value)
        for name, value in tensors.items()
        if RESNET_NAME.match(name) and not name.endswith("num_batches_tracked")
    }


def to_array(value: Any) -> np.ndarray:
    """Float32 copy of a tensor or array of any shape, contiguous."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().float().numpy()
    return np.array(value, dtype=np.float32, order="C")


def torchvision_name(architecture: Architecture) -> str:
    """Name of the torchvision network (or of its hub cousin resnext101_32x4d) with these tensors.

    Raises:
        ArchitectureError: torchvision has none; says which key is in the way.
    """
    blocked = {
        "backbone": architecture.backbone if not architecture.is_resnet else "",
        "norm": architecture.norm if architecture.norm != "BN" else "",
        "deform_on_per_stage": any(architecture.deform_on_per_stage or ()),
        # Basic blocks have no 1x1 convolution to put a stride in.
        "stride_in_1x1": architecture.stride_in_1x1 and architecture.depth not in (18, 34),
    }
    for key, value in blocked.items():
        if value:
            raise ArchitectureError(
                f"torchvision has no such network: {key} is {getattr(architecture, key)}; "
                "write the Detectron2 format instead"
            )
    basic = architecture.depth in (18, 34)
    width = 64 if basic else architecture.width_per_group
    name = _TORCHVISION_NAMES.get((architecture.depth, architecture.num_groups, width))
    channels = (architecture.stem_out_channels, architecture.res2_out_channels)
    if name is None or channels != (64, 64 if basic else 256):
        raise ArchitectureError(
            f"torchvision has no ResNet of depth {architecture.depth} with "
            f"{architecture.num_groups} groups of width {width} and {channels} channels in stem "
            "and res2; write the Detectron2 format instead"
        )
    return name


def to_torchvision(arrays: Mapping[str, np.ndarray], passport: Passport) -> OrderedDict:
    """A state dict that the torchvision network loads with strict=True.

    The classifier ``fc`` is zeros of shape (1000, C): there because strict loading asks for it,
    and to be replaced. The passport rides in the state dict's metadata, which loading ignores.

    Raises:
        ArchitectureError: see ``torchvision_name``.
    """
    torchvision_name(passport.architecture)
    state: OrderedDict = OrderedDict()
    for name, array in arrays.items():
        theirs = name_to_torchvision(name)
        state[theirs] = torch.from_numpy(np.array(array))
        if theirs.endswith("running_var"):
            counter = theirs.removesuffix("running_var") + "num_batches_tracked"
            state[counter] = torch.zeros((), dtype=torch.long)
    last = max(name for name in arrays if re.fullmatch(r"res5\.\d+\.conv\d\.weight", name))
    channels = arrays[last].shape[0]
    state["fc.weight"] = torch.zeros(TORCHVISION_CLASSES, channels)
    state["fc.bias"] = torch.zeros(TORCHVISION_CLASSES)
    return state


def _imagenet_passport(
    arrays: Arrays,
    input_format: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    stride_in_1x1: bool,
) -> Passport:
    found = read_architecture({name: array.shape for name, array in arrays.items()})
    architecture = Architecture(
        **{"width_per_group": 64, **found},
        stride_in_1x1=stride_in_1x1,
        deform_modulated=False,
        deform_num_groups=1,
    )
    return Passport("imagenet", architecture, input_format, mean, std, dataset="ImageNet-1k")

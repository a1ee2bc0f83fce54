"""Small networks with known answers, and small Detectron2 backbones, for tests of the ERF."""

import numpy as np
import torch
from detectron2.layers import Conv2d, get_norm
from detectron2.modeling import FPN, Backbone, build_backbone
from torch import nn

from jigsaw_d2.config import get_jigsaw_cfg

TINY_RESNET = [
    "MODEL.DEVICE", "cpu",
    "MODEL.RESNETS.DEPTH", 50,
    "MODEL.RESNETS.NORM", "BN",
    "MODEL.RESNETS.STEM_OUT_CHANNELS", 4,
    "MODEL.RESNETS.WIDTH_PER_GROUP", 4,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 8,
    "MODEL.RESNETS.STRIDE_IN_1X1", False,
    "MODEL.BACKBONE.FREEZE_AT", 0,
]  # fmt: skip


class Named(Backbone):
    """A chain of layers whose output is the feature "out"."""

    def __init__(self, *layers: nn.Module, stride: int = 1, channels: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self._out_features = ["out"]
        self._out_feature_strides = {"out": stride}
        self._out_feature_channels = {"out": channels}

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.layers(images)}


class Halving(Backbone):
    """Five convolutions that halve the image: features "c1" to "c5" of stride 2 to 32."""

    def __init__(self, norm: str = "BN", kernel: int = 3) -> None:
        super().__init__()
        channels = (8, 16, 16, 16, 16)
        self.layers = nn.ModuleList(
            Conv2d(
                *(inside, outside, kernel, 2, kernel // 2),
                norm=get_norm(norm, outside),
                activation=nn.ReLU(),
            )
            for inside, outside in zip((3, *channels), channels)
        )
        self._out_features = [f"c{n + 1}" for n in range(len(channels))]
        self._out_feature_strides = {f: 2 ** (n + 1) for n, f in enumerate(self._out_features)}
        self._out_feature_channels = dict(zip(self._out_features, channels))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = {}
        for name, layer in zip(self._out_features, self.layers):
            features[name] = images = layer(images)
        return features


def small_pyramid(norm: str = "BN", kernel: int = 3, seed: int = 0) -> FPN:
    """p3, p4 and p5 of 16 channels on ``Halving``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return FPN(Halving(norm, kernel), ["c3", "c4", "c5"], 16)


def ones_conv(inputs: int, outputs: int, **geometry: int) -> nn.Conv2d:
    """3x3 convolution of ones, zero-padded so that stride 1 keeps the size."""
    geometry.setdefault("padding", geometry.get("dilation", 1))
    conv = nn.Conv2d(inputs, outputs, 3, bias=False, **geometry)
    nn.init.ones_(conv.weight)
    return conv


def line_operator(size: int, stride: int = 1, dilation: int = 1) -> np.ndarray:
    """The same convolution along one axis as an integer matrix: (outputs, inputs), 3 taps of one.

    A chain of ``ones_conv`` is the product of its matrices, and separable: the ERF of cell (j, k)
    is the outer product of row j and row k, times the number of paths through the channels.
    """
    outputs = (size - 1) // stride + 1
    matrix = np.zeros((outputs, size), dtype=np.int64)
    for out in range(outputs):
        for tap in (-1, 0, 1):
            position = out * stride + tap * dilation
            if 0 <= position < size:
                matrix[out, position] += 1
    return matrix


def tiny_backbone(
    *overrides: object, features: tuple[str, ...] = ("res5",), seed: int = 0
) -> nn.Module:
    """ResNet-50 of 4 to 64 channels, randomly initialised; statistics of its norms random too."""
    cfg = get_jigsaw_cfg(
        "", [*TINY_RESNET, "MODEL.RESNETS.OUT_FEATURES", list(features), *overrides]
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = build_backbone(cfg)
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return backbone


def tiny_fpn(seed: int = 0) -> nn.Module:
    """Feature pyramid p2..p6 of 8 channels on the tiny ResNet."""
    name = "build_resnet_fpn_backbone"
    features = ("res2", "res3", "res4", "res5")
    fpn = ["MODEL.FPN.IN_FEATURES", list(features), "MODEL.FPN.OUT_CHANNELS", 8]
    return tiny_backbone("MODEL.BACKBONE.NAME", name, *fpn, features=features, seed=seed)

"""Networks of timm and torchvision as backbones: features, pyramids, what they refuse."""

import sys

import pytest
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone
from torch.nn.modules.batchnorm import _BatchNorm

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.io import ConfigError
from jigsaw_d2.modeling.backbones import feature_name, library_of

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def library_config(library: str, network: str, *overrides: object, kind: str = "") -> CfgNode:
    name = f"build_{library}_{kind}backbone"
    if kind == "retinanet_":
        name = f"build_retinanet_{library}_fpn_backbone"
    keys = ["MODEL.BACKBONE.NAME", name, f"MODEL.{library.upper()}.NAME", network]
    return get_jigsaw_cfg("", [*keys, *overrides])


def has(library: str) -> None:
    pytest.importorskip(library, reason=f"{library} is not installed: pip install {library}")


NETWORKS = [  # channels of res2 to res5, as their papers have them
    ("torchvision", "swin_t", (96, 192, 384, 768)),
    ("torchvision", "mobilenet_v3_small", (16, 24, 48, 576)),
    ("torchvision", "regnet_y_400mf", (48, 104, 208, 440)),
    ("timm", "convnext_atto", (40, 80, 160, 320)),
    ("timm", "swin_tiny_patch4_window7_224", (96, 192, 384, 768)),
    ("timm", "efficientnet_b0", (24, 40, 112, 320)),
    ("timm", "resnet18", (64, 128, 256, 512)),
]


@pytest.mark.parametrize(("library", "network", "channels"), NETWORKS)
def test_features_by_stride(library: str, network: str, channels: tuple[int, ...]) -> None:
    """What output_shape() says is what comes out, and every parameter leads to res5."""
    has(library)
    swin = ["MODEL.TIMM.KWARGS", [["strict_img_size", False]]] * network.startswith("swin_tiny")
    backbone = build_backbone(library_config(library, network, *swin)).train()
    shapes, features = backbone.output_shape(), backbone(IMAGES)
    assert set(features) == set(shapes)
    for name, stride, width in zip(("res2", "res3", "res4", "res5"), (4, 8, 16, 32), channels):
        assert (shapes[name].channels, shapes[name].stride) == (width, stride)
        assert features[name].shape == (2, width, 64 // stride, 64 // stride)
    features["res5"].square().sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_torchvisions_own_features_come_out() -> None:
    """With the same tensors, what its classifier pools."""
    backbone = build_backbone(library_config("torchvision", "mobilenet_v3_small")).eval()
    theirs = torchvision.models.mobilenet_v3_small().eval()
    theirs.features.load_state_dict(backbone.net.state_dict())
    with torch.no_grad():
        assert torch.allclose(backbone(IMAGES)["res5"], theirs.features(IMAGES))


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_under_the_pyramids(library: str) -> None:
    has(library)
    fpn = ["MODEL.FPN.OUT_CHANNELS", 8, "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]]
    for kind, levels in (("fpn_", 4), ("retinanet_", 5)):  # p6 by pooling, p6 and p7 by convolution
        pyramid = build_backbone(library_config(library, "resnet18", *fpn, kind=kind))
        assert [f.shape[2] for f in pyramid(IMAGES).values()] == [8, 4, 2, 1, 1][:levels]
    fpn[-1] = ["res7"]
    with pytest.raises(ConfigError, match="'res7': the network has stem, res2, res3, res4, res5"):
        build_backbone(library_config(library, "resnet18", *fpn, kind="fpn_"))


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_outputs_channels_and_frozen_norms_are_chosen(library: str) -> None:
    has(library)
    node = f"MODEL.{library.upper()}"
    keys = [f"{node}.OUT_FEATURES", ["res4"], f"{node}.FREEZE_NORM", True]
    cfg = library_config(library, "resnet18", *keys, "MODEL.PIXEL_MEAN", [1.0] * 4)
    backbone = build_backbone(cfg).train()
    features = backbone(torch.randn(2, 4, 64, 64))
    assert "res5" not in features and features["res4"].shape[1] == 256
    assert sum(p.numel() for p in backbone.parameters()) < 3e6  # 11.2 million with res5
    norms = [module for module in backbone.modules() if isinstance(module, _BatchNorm)]
    assert norms and all(torch.equal(m.running_mean, 0 * m.running_mean) for m in norms)
    assert not any(p.requires_grad for m in norms for p in m.parameters())


@pytest.mark.parametrize(
    ("library", "network", "message"),
    [
        ("torchvision", "convnext_huge", "TORCHVISION.NAME 'convnext_huge'.*list_models"),
        ("torchvision", "vit_b_16", "TORCHVISION.NAME 'vit_b_16'.*no chain"),
        ("timm", "convnext_gigantic", "TIMM.NAME 'convnext_gigantic'.*list_models"),
    ],
)
def test_networks_that_are_none(library: str, network: str, message: str) -> None:
    has(library)
    with pytest.raises(ConfigError, match=message):
        build_backbone(library_config(library, network))


def test_without_timm_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # import fails
    with pytest.raises(ConfigError, match=r"needs timm.*pip install timm, or jigsaw_d2 with its"):
        build_backbone(library_config("timm", "resnet18"))


def test_names() -> None:
    assert [feature_name(stride) for stride in (2, 4, 32, 14)] == [
        "stem",
        "res2",
        "res5",
        "stride14",
    ]
    assert library_of("build_retinanet_timm_fpn_backbone") == "timm"
    assert library_of("build_resnet_backbone") == library_of("build_my_timmy_backbone") == ""


def test_a_transformer_named_by_its_only_stride_is_whole() -> None:
    """All of a ViT's features have stride 16: res4 is its last block."""
    has("timm")
    keys = ["MODEL.TIMM.KWARGS", [["img_size", 32]]]
    whole, named = (
        build_backbone(library_config("timm", "vit_tiny_patch16_224", *keys, *more))
        for more in ([], ["MODEL.TIMM.OUT_FEATURES", ["res4"]])
    )
    assert [*whole.state_dict()] == [*named.state_dict()]


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_arguments_that_are_no_pairs(library: str) -> None:
    has(library)
    keys = [f"MODEL.{library.upper()}.KWARGS", ["img_size", 224]]
    with pytest.raises(ConfigError, match="NAME, VALUE"):
        build_backbone(library_config(library, "resnet18", *keys))

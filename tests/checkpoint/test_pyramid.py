"""A pre-trained feature pyramid: conversion, strict loading, equal features, what is left out."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN as Pyramid
from detectron2.modeling.backbone import RegNet
from detectron2.modeling.backbone.regnet import ResBottleneckBlock, SimpleStem
from helpers_weights import (
    C4,
    FPN,
    MASK,
    RETINANET,
    THIN,
    build_detector,
    convert_model,
    rewrite,
    small_detection_config,
)
from torch import nn

from jigsaw_d2.checkpoint.convert import convert_checkpoint
from jigsaw_d2.checkpoint.loading import load_backbone
from jigsaw_d2.checkpoint.metadata import WeightsMetadata
from jigsaw_d2.checkpoint.reading import read_converted
from jigsaw_d2.detection.config import apply_metadata
from jigsaw_d2.io import ConfigError, WeightsError

CASCADE = "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml"
IMAGE = torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(0))


def pyramid(first: int = 2, *more: str, builder: str = "build_resnet_fpn_backbone") -> list[str]:
    """KEY VALUE pairs of a pre-training of p``first`` to p5 of 8 channels."""
    stages, levels = ([f"{kind}{n}" for n in range(first, 6)] for kind in ("res", "p"))
    keys = ["MODEL.BACKBONE.NAME", builder, "MODEL.FPN.IN_FEATURES", str(stages)]
    keys += ["MODEL.JIGSAW.IN_FEATURES", str(levels), "MODEL.FPN.OUT_CHANNELS", "8"]
    return [*THIN, *keys, *more]


def detector(name: str, weights: Path) -> nn.Module:
    """As finetune_net.py --match-architecture builds it."""
    cfg = small_detection_config(name)
    cfg.MODEL.FPN.OUT_CHANNELS = 16  # the file's 8 are taken
    apply_metadata(cfg, read_converted(weights)[1], match_architecture=True)
    return build_detector(cfg)


@torch.no_grad()
def features(model: nn.Module) -> dict[str, torch.Tensor]:
    if hasattr(model, "preprocess"):
        return model.backbone(model.preprocess(IMAGE[None].to(torch.uint8)))
    return model.backbone(model.preprocess_image([{"image": IMAGE}]).tensor)


@pytest.mark.parametrize("norm", ["", "BN"])
def test_features_equal_the_pretrainings(norm: str, tmp_path: Path, caplog) -> None:
    """p2..p5 to 1e-5; RetinaNet has no p2 and its own p6 and p7."""
    model, weights = convert_model(tmp_path, *pyramid(2, "MODEL.FPN.NORM", norm))
    expected, tensors = features(model), read_converted(weights)[0]
    for name in (FPN, MASK, CASCADE, RETINANET):
        loaded = detector(name, weights)
        caplog.clear()
        report = load_backbone(loaded, weights)
        pieces = [n for n in tensors if n.startswith("fpn_") and n.split(".")[0][-1] == "2"]
        left_out = pieces if name == RETINANET else []
        assert list(report.no_room) == sorted(left_out), name
        assert len(report.filled) == len(tensors) - len(left_out)
        assert bool(left_out) == ("no fpn_lateral2, fpn_output2; left out" in caplog.text)
        for level, feature in features(loaded).items():
            if level in ("p6", "p7"):
                continue
            scale = expected[level].abs().max()
            assert scale > 0.01 and (feature - expected[level]).abs().max() / scale < 1e-5, level
        assert [m for m in report.new_modules if m.startswith("backbone")] == (
            ["backbone.top_block"] if name == RETINANET else []
        )


def test_c4_takes_the_backbone_and_says_what_it_leaves(tmp_path: Path, caplog) -> None:
    model, weights = convert_model(tmp_path, *pyramid(3))
    loaded = detector(C4, weights)
    report = load_backbone(loaded, weights)
    # two convolutions with weight and bias on each of three levels
    assert len(report.no_room) == 12 and all(n.startswith("fpn_") for n in report.no_room)
    assert "the network has no fpn_lateral3, fpn_lateral4, fpn_lateral5, fpn_out" in caplog.text
    assert len(report.filled) == 265
    state = model.backbone.bottom_up.state_dict()
    assert torch.equal(loaded.backbone.res4[0].conv1.weight, state["res4.0.conv1.weight"])


def test_levels_that_were_not_trained_stay_new(tmp_path: Path, caplog) -> None:
    _, weights = convert_model(tmp_path, *pyramid(3))
    with caplog.at_level(logging.INFO):
        report = load_backbone(detector(FPN, weights), weights)
    new = [name for name in report.new_modules if name.startswith("backbone")]
    assert new == ["backbone.fpn_lateral2", "backbone.fpn_output2"] and not report.no_room
    assert "new, with random weights: backbone.fpn_lateral2" in caplog.text


def test_the_top_block_travels_where_it_is_trained(tmp_path: Path) -> None:
    """RetinaNet's p6 and p7, on a canvas whose regions they divide."""
    builder = "build_retinanet_resnet_fpn_backbone"
    overrides = pyramid(3, builder=builder)
    overrides[overrides.index("MODEL.JIGSAW.IN_FEATURES") + 1] = "['p3', 'p4', 'p5', 'p6', 'p7']"
    overrides += ["INPUT.JIGSAW.TEMPLATE_SIZE", "[256, 256]", "INPUT.JIGSAW.TEMPLATE_SPLIT"]
    model, weights = convert_model(tmp_path, *overrides, "[128, 128]")
    loaded = detector(RETINANET, weights)
    report = load_backbone(loaded, weights)
    assert not report.no_room and not [m for m in report.new_modules if m.startswith("backbone")]
    expected = features(model)
    for level, feature in features(loaded).items():
        torch.testing.assert_close(feature, expected[level], rtol=1e-4, atol=1e-5)


def test_metadata_says_what_was_trained_and_what_it_needs(tmp_path: Path) -> None:
    _, weights = convert_model(tmp_path, *pyramid(3, "MODEL.FPN.NORM", "BN"))
    metadata = read_converted(weights)[1]
    assert metadata.levels["trained"] == ["p3", "p4", "p5"]
    required = metadata.required_config()
    assert required["MODEL.FPN.NORM"] == required["MODEL.RESNETS.NORM"] == "FrozenBN"
    assert (required["MODEL.FPN.FUSE_TYPE"], required["MODEL.FPN.OUT_CHANNELS"]) == ("sum", 8)
    assert WeightsMetadata.from_yaml(metadata.to_yaml()) == metadata
    cfg = small_detection_config(FPN, *THIN)
    with pytest.raises(ConfigError, match="FPN.OUT_CHANNELS: config 8, weights 16"):
        apply_metadata(
            cfg,
            WeightsMetadata.from_dict(
                metadata.to_dict() | {"levels": metadata.levels | {"out_channels": 16}}
            ),
            explicit=frozenset(["MODEL.FPN.OUT_CHANNELS"]),
        )


def test_one_feature_writes_what_it_wrote(tmp_path: Path) -> None:
    """No new key, so that files of before keep their digest."""
    _, weights = convert_model(tmp_path, *THIN)
    metadata = read_converted(weights)[1]
    assert metadata.levels is None and "levels" not in metadata.to_dict()


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "array", "message"),
        [
            (
                "fpn_output4.bias",
                None,
                "In the network, not in the file (1):\n    fpn_output4.bias",
            ),
            (
                "fpn_output4.norm.weight",
                np.ones(8),
                "In the file, not in the network (1):\n    fpn",
            ),
            ("fpn_lateral3.weight", np.ones((8, 2, 1, 1)), "fpn_lateral3.weight: file (8, 2, 1, 1"),
        ],
    )
    def test_part_of_a_level(self, name: str, array, message: str, tmp_path: Path) -> None:
        _, weights = convert_model(tmp_path, *pyramid(3))

        def change(data: dict) -> None:
            data["model"].pop(name, None)
            data["model"] |= {} if array is None else {name: array.astype(np.float32)}

        loaded = detector(FPN, weights)
        with pytest.raises(WeightsError) as error:
            load_backbone(loaded, rewrite(weights, change, seal=True))
        assert message in str(error.value)

    def test_another_way_to_fuse(self, tmp_path: Path) -> None:
        _, weights = convert_model(tmp_path, *pyramid(3))
        loaded = detector(FPN, weights)
        loaded.backbone._fuse_type = "avg"
        with pytest.raises(WeightsError, match="fuse_type: file sum, network avg"):
            load_backbone(loaded, weights)


def test_torchvision_takes_the_backbone(tmp_path: Path, caplog) -> None:
    _, weights = convert_model(tmp_path, *pyramid(3))
    with caplog.at_level(logging.INFO):
        with pytest.raises(WeightsError, match="torchvision has no such network: stem_out_ch"):
            convert_checkpoint(weights, tmp_path / "w.pth", format="torchvision")
    assert "left out 12 tensors" in caplog.text


@BACKBONE_REGISTRY.register()
def build_regnet_fpn_backbone(cfg, input_shape) -> Pyramid:
    """RegNetX-200MF under a pyramid."""
    network = RegNet(
        stem_class=SimpleStem,
        stem_width=8,
        block_class=ResBottleneckBlock,
        depth=13,
        w_a=36.44,
        w_0=24,
        w_m=2.49,
        group_width=8,
        norm="BN",
        out_features=["s2", "s3", "s4"],
    )
    return Pyramid(network, ["s2", "s3", "s4"], 8)


def test_a_regnets_pyramid(tmp_path: Path) -> None:
    stages = ["MODEL.BACKBONE.NAME", "build_regnet_fpn_backbone"]
    overrides = [*stages, "MODEL.JIGSAW.IN_FEATURES", "['p3', 'p4', 'p5']"]
    model, weights = convert_model(tmp_path, *overrides, "MODEL.FPN.OUT_CHANNELS", "8")
    cfg = small_detection_config(RETINANET, *stages)
    apply_metadata(cfg, read_converted(weights)[1])
    cfg.MODEL.RETINANET.IN_FEATURES = ["p3", "p4", "p5"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128]]
    loaded = build_detector(cfg)
    assert not load_backbone(loaded, weights).mismatch
    expected = features(model)
    for level, feature in features(loaded).items():
        torch.testing.assert_close(feature, expected[level], rtol=1e-4, atol=1e-5)

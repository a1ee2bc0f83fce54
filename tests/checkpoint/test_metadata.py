"""What tensors, config and metadata say of a network; the metadata's form and its seal."""

from dataclasses import replace

import numpy as np
import pytest
import yaml
from detectron2.modeling import build_backbone
from helpers_weights import RESNET_18, pretrain_config

from jigsaw_d2.checkpoint.metadata import (
    Architecture,
    WeightsMetadata,
    check_architecture,
    fits,
    read_architecture,
)
from jigsaw_d2.io import CheckpointError, WeightsError

DEFORM = ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", "[False, False, True, True]"]
ARRAYS = {"stem.conv1.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}


def metadata(**changes: object) -> WeightsMetadata:
    made = WeightsMetadata(
        origin="jigsaw",
        architecture=Architecture.from_config(pretrain_config().MODEL),
        input_format="RGB",
        pixel_mean=(123.675, 116.28, 103.53),
        pixel_std=(58.395, 57.12, 57.375),
        categories=("a", "b"),
        template={"size": [224, 224], "split": [64, 64]},
        objective="erf_adaptive",
        tau=0.7,
        iterations=10,
        images_seen=5120,
        dataset="toy",
        dataset_hash="00",
        code_version="0.1.0",
    )
    return replace(made, **changes)


def test_round_trips() -> None:
    made = metadata().sealed(ARRAYS)
    assert WeightsMetadata.from_dict(made.to_dict()) == made
    assert WeightsMetadata.from_yaml(made.to_yaml()) == made
    yaml.safe_load(made.to_yaml())  # plain values only


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 3}, "format version 3, this code reads 1 to 2"),
        ({"pixel_mean": "red"}, "could not convert"),
        ({"colour": 1}, r"unknown keys \['colour'\]"),
        ({"architecture": {"shape": 1}}, "argument 'shape'"),
    ],
)
def test_impossible_values(change: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        WeightsMetadata.from_dict(metadata().to_dict() | change)


def test_missing_key_and_no_mapping() -> None:
    values = metadata().to_dict()
    del values["categories"]
    with pytest.raises(CheckpointError, match=r"w.pkl: missing or unknown keys \['categories'\]"):
        WeightsMetadata.from_dict(values, "w.pkl")
    with pytest.raises(CheckpointError, match="expected a mapping, found list"):
        WeightsMetadata.from_dict([], "w.pkl")
    with pytest.raises(CheckpointError, match="no YAML"):
        WeightsMetadata.from_yaml("{")


@pytest.mark.parametrize(
    ("key", "have", "need", "expected"),
    [
        ("MODEL.PIXEL_STD", [58.395, 57.12, 57.375], (58.3955, 57.12, 57.375), True),
        ("MODEL.PIXEL_STD", [58.395, 57.12, 57.375], (58.397, 57.12, 57.375), False),
        ("MODEL.PIXEL_MEAN", [1.0, 2.0], [1.0, 2.0, 3.0], False),
        ("MODEL.RESNETS.NORM", "SyncBN", "FrozenBN", True),
        ("MODEL.RESNETS.NORM", "GN", "LN", False),
        ("INPUT.FORMAT", "BGR", "RGB", False),
    ],
)
def test_fits(key: str, have: object, need: object, expected: bool) -> None:
    """One tolerance everywhere: a thousandth of a pixel's 256 steps."""
    assert fits(key, have, need) is expected


# ---- what the tensors say of their network


def shapes_of(*overrides: str) -> dict[str, tuple[int, ...]]:
    cfg = pretrain_config(*overrides)
    return {name: tuple(v.shape) for name, v in build_backbone(cfg).state_dict().items()}


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        RESNET_18,
        ["MODEL.RESNETS.NORM", "GN"],
        ["MODEL.RESNETS.NUM_GROUPS", "32", "MODEL.RESNETS.WIDTH_PER_GROUP", "4"],
        DEFORM,
        ["MODEL.RESNETS.DEPTH", "101", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"],
    ],
)
def test_tensors_and_config_agree(overrides: list[str]) -> None:
    said = Architecture.from_config(pretrain_config(*overrides).MODEL)
    found = read_architecture(shapes_of(*overrides))
    check_architecture(said, shapes_of(*overrides))
    assert {key: getattr(said, key) for key in found} == found


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["MODEL.RESNETS.DEPTH", "101"], "depth: said 101, the tensors are 50"),
        (["MODEL.RESNETS.NORM", "GN"], "norm: said GN, the tensors are BN"),
        (["MODEL.RESNETS.NUM_GROUPS", "2"], "num_groups: said 2, the tensors are 1"),
        (["MODEL.RESNETS.STEM_OUT_CHANNELS", "32"], "stem_out_channels: said 32"),
        (DEFORM, "deform_on_per_stage"),
    ],
)
def test_a_wrong_word_is_found_out(overrides: list[str], named: str) -> None:
    said = Architecture.from_config(pretrain_config(*overrides).MODEL)
    with pytest.raises(WeightsError, match=named):
        check_architecture(said, shapes_of())


def test_other_norms_than_batch_norm_look_like_group_norm() -> None:
    """Layer norm has the same tensors as group norm; batch norm or none at all has not."""
    shapes = shapes_of("MODEL.RESNETS.NORM", "GN")
    check_architecture(replace(metadata().architecture, norm="LN"), shapes)
    for norm in ("BN", ""):
        with pytest.raises(WeightsError, match="norm"):
            check_architecture(replace(metadata().architecture, norm=norm), shapes)


def test_what_is_no_whole_network() -> None:
    """But trailing stages may be absent: a pre-training on res4 builds no res5."""
    shapes = shapes_of()
    read_architecture({n: s for n, s in shapes.items() if not n.startswith("res5.")})
    with pytest.raises(WeightsError, match=r"\(3, 4, 5, 3\) bottleneck blocks"):
        read_architecture({n: s for n, s in shapes.items() if not n.startswith("res4.5.")})
    with pytest.raises(WeightsError, match="no ResNet.*found fc.weight"):
        read_architecture({"fc.weight": (10, 4)})


def test_a_registered_backbone_is_known_by_name_alone() -> None:
    model = pretrain_config("MODEL.BACKBONE.NAME", "build_mine").MODEL
    said = Architecture.from_config(model)
    assert said == Architecture(backbone="build_mine") and not said.is_resnet
    assert said.required_config() == {}
    check_architecture(said, {"any.weight": (1,)})

"""The metadata rules the config; an explicit word against it is refused, with both values."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_weights import (
    C4,
    FPN,
    RESNET_18,
    RETINANET,
    SMALL,
    THIN,
    convert,
    make_coco,
    pretrain_config,
)

from jigsaw_d2.checkpoint.metadata import Architecture, WeightsMetadata
from jigsaw_d2.detection.config import (
    SCRATCH_METADATA,
    apply_metadata,
    fit_machine,
    get_key,
    load_detection_config,
    read_metadata,
    setup_finetune,
)
from jigsaw_d2.io import ConfigError


def metadata(*overrides: str) -> WeightsMetadata:
    architecture = Architecture.from_config(pretrain_config(*overrides).MODEL)
    return replace(SCRATCH_METADATA, origin="jigsaw", architecture=architecture)


def applied(said: WeightsMetadata, *overrides: str, name: str = FPN, **options: bool):
    cfg = load_detection_config(name, overrides)
    apply_metadata(cfg, said, explicit=frozenset(overrides[::2]), **options)
    return cfg


DEFORM = ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", "[False, True, True, True]")
MODULATED = ("MODEL.RESNETS.DEFORM_MODULATED", "True")
GN = ("MODEL.RESNETS.NORM", "GN")
BN = ("MODEL.JIGSAW.SCRATCH_NORM", "BN")


@pytest.mark.parametrize(
    ("said", "overrides", "both"),
    [
        ((), ("MODEL.PIXEL_MEAN", "[103.53, 116.28, 123.675]"), "103.53, 116.28, 123.675"),
        ((), ("MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]"), "1.0, 1.0, 1.0"),
        ((), ("INPUT.FORMAT", "BGR"), "config BGR, weights RGB"),
        ((), ("MODEL.RESNETS.STRIDE_IN_1X1", "True"), "config True, weights False"),
        ((), GN, "config GN, weights FrozenBN"),
        (GN, ("MODEL.RESNETS.NORM", "FrozenBN"), "config FrozenBN, weights GN"),
        ((), ("MODEL.RESNETS.DEPTH", "101"), "config 101, weights 50"),
        ((), ("MODEL.RESNETS.NUM_GROUPS", "32"), "config 32, weights 1"),
        ((), DEFORM, "weights .False, False, False, False."),
        # new offsets must be a plain convolution at first
        ((), (*MODULATED, *DEFORM, "MODEL.JIGSAW.NEW_OFFSETS", "True"), "config True, weights Fal"),
        ((*DEFORM, *MODULATED), ("MODEL.RESNETS.DEFORM_MODULATED", "False", *DEFORM), "weights Tr"),
        ("scratch", ("MODEL.RESNETS.NORM", "FrozenBN"), "config FrozenBN"),
        ("scratch", ("MODEL.BACKBONE.FREEZE_AT", "2"), "config 2"),
        # the same tensors, frozen at random
        ("scratch", ("MODEL.RESNETS.NORM", "FrozenBN", *BN), "config FrozenBN, weights BN"),
    ],
)
def test_an_override_against_the_metadata(said: tuple | str, overrides: tuple, both: str) -> None:
    weights = SCRATCH_METADATA if said == "scratch" else metadata(*said)
    with pytest.raises(ConfigError, match=f"{overrides[0]}: .*{both}.*--force insists"):
        applied(weights, *overrides)
    insisted = applied(weights, *overrides, force=True)
    given = load_detection_config(FPN, overrides)
    assert get_key(insisted, overrides[0]) == get_key(given, overrides[0])


def test_overrides_that_are_no_contradiction() -> None:
    """Zoo configs are written for MSRA's weights: BGR, std 1, stride in the 1x1."""
    cfg = applied(metadata())
    assert cfg.INPUT.FORMAT == "RGB" and cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 is False and cfg.MODEL.RESNETS.NORM == "FrozenBN"
    assert cfg.MODEL.BACKBONE.FREEZE_AT == 2  # the zoo's, for every initialisation alike
    overrides = ("MODEL.PIXEL_STD", "[58.3950, 57.120, 57.375]", "INPUT.FORMAT", "RGB")
    assert applied(metadata(), *overrides) == cfg
    assert applied(metadata(), "MODEL.RESNETS.NORM", "SyncBN").MODEL.RESNETS.NORM == "SyncBN"
    assert applied(metadata(*GN)).MODEL.RESNETS.NORM == "GN"
    applied(metadata(), *DEFORM, "MODEL.JIGSAW.NEW_OFFSETS", "True")
    with pytest.raises(ConfigError, match="MODEL.RESNETS.DEPTH.*INPUT.FORMAT"):  # all at once
        applied(metadata(), "INPUT.FORMAT", "BGR", "MODEL.RESNETS.DEPTH", "101")


def test_another_network_is_refused_or_taken_over() -> None:
    """The zoo has no ResNet-18: --match-architecture makes one of its ResNet-50 configs."""
    said = metadata(*RESNET_18)
    with pytest.raises(ConfigError, match="DEPTH: config 50, weights 18.*--match-architecture"):
        applied(said)
    cfg = applied(said, match_architecture=True)
    assert (cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS) == (18, 64)
    with pytest.raises(ConfigError, match="DEPTH: config 50, weights 18"):
        applied(said, "MODEL.RESNETS.DEPTH", "50", match_architecture=True)


def test_random_weights_get_a_norm_that_trains_and_nothing_frozen() -> None:
    assert read_metadata("none") == read_metadata("") == SCRATCH_METADATA
    cfg = applied(SCRATCH_METADATA, name=C4)
    assert (cfg.MODEL.RESNETS.NORM, cfg.MODEL.BACKBONE.FREEZE_AT) == ("GN", 0)
    assert cfg.INPUT.FORMAT == "RGB" and cfg.MODEL.RESNETS.STRIDE_IN_1X1 is False
    # other norms that train are the user's choice
    assert applied(SCRATCH_METADATA, "MODEL.RESNETS.NORM", "BN").MODEL.RESNETS.NORM == "BN"
    assert applied(SCRATCH_METADATA, *BN).MODEL.RESNETS.NORM == "BN"
    zoo = "Misc/scratch_mask_rcnn_R_50_FPN_9x_syncbn.yaml"
    assert applied(SCRATCH_METADATA, name=zoo).MODEL.RESNETS.NORM == "SyncBN"


def test_the_small_detector_states_the_norm_of_both_initialisations() -> None:
    small, trains = "finetune/faster_rcnn_R_18_FPN_small.yaml", ("MODEL.RESNETS.NORM", "BN")
    for weights, overrides, norm in (
        (metadata(*RESNET_18), (), "FrozenBN"),
        (metadata(*RESNET_18), trains, "BN"),
        (SCRATCH_METADATA, (), "BN"),
        (SCRATCH_METADATA, trains, "BN"),
        (SCRATCH_METADATA, ("MODEL.JIGSAW.SCRATCH_NORM", "GN"), "GN"),
    ):
        cfg = applied(weights, *overrides, name=small)
        assert (cfg.MODEL.RESNETS.NORM, cfg.MODEL.BACKBONE.FREEZE_AT) == (norm, 0)


def test_setup_joins_weights_data_and_machine(tmp_path: Path) -> None:
    weights = convert(tmp_path, *THIN)
    files = make_coco(tmp_path / "setup_data")
    data = ["DATASETS.COCO_FILES", str(files), "DATASETS.TRAIN", "('setup_data_set',)"]
    data += ["DATASETS.TEST", "()"]
    cfg = setup_finetune(RETINANET, weights, [*SMALL, *THIN, *data])
    assert cfg.MODEL.WEIGHTS == str(weights)
    assert (cfg.MODEL.RETINANET.NUM_CLASSES, cfg.MODEL.ROI_HEADS.NUM_CLASSES) == (3, 3)
    assert setup_finetune(RETINANET, "none", [*SMALL, *data]).MODEL.WEIGHTS == ""
    classes = ["MODEL.RETINANET.NUM_CLASSES", "5"]
    with pytest.raises(ConfigError, match="NUM_CLASSES: config 5, dataset .* has 3: cell, plate"):
        setup_finetune(RETINANET, weights, [*SMALL, *THIN, *data, *classes])
    with pytest.raises(ConfigError, match="MODEL.WEIGHTS is set by --weights"):
        setup_finetune(RETINANET, weights, ["MODEL.WEIGHTS", "x.pkl"])
    only = ["SOLVER.ACCUMULATION_STEPS", "2", "SOLVER.TF32", "True"]
    with pytest.raises(ConfigError, match="ACCUMULATION_STEPS, SOLVER.TF32: of pre-training alone"):
        setup_finetune(RETINANET, weights, only)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_gpu_is_fitted() -> None:
    settings = ["MODEL.RESNETS.NORM", "SyncBN", "MODEL.FPN.NORM", "SyncBN"]
    cfg = load_detection_config(FPN, [*settings, "SOLVER.AMP.ENABLED", "True"])
    fit_machine(cfg)
    assert (cfg.MODEL.DEVICE, cfg.MODEL.RESNETS.NORM, cfg.MODEL.FPN.NORM) == ("cpu", "BN", "BN")
    assert cfg.SOLVER.AMP.ENABLED is False


def test_norms_of_a_library_network_are_frozen_unless_the_user_says_otherwise() -> None:
    node = {"MODEL.TORCHVISION.NAME": "mobilenet_v3_small", "MODEL.TORCHVISION.KWARGS": []}
    said = replace(metadata(), network={"config": node, "batch_norm": True})
    said = replace(
        said, architecture=replace(said.architecture, backbone="build_torchvision_backbone")
    )
    name = ("MODEL.BACKBONE.NAME", "build_torchvision_fpn_backbone")
    name += ("MODEL.TORCHVISION.NAME", "mobilenet_v3_small")
    assert applied(said, *name).MODEL.TORCHVISION.FREEZE_NORM is True
    trains = ("MODEL.TORCHVISION.FREEZE_NORM", "False")
    assert applied(said, *name, *trains).MODEL.TORCHVISION.FREEZE_NORM is False

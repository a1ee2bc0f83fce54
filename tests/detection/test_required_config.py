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


CONTRADICTIONS = {
    "mean": ("MODEL.PIXEL_MEAN", "[103.53, 116.28, 123.675]", "103.53, 116.28, 123.675"),
    "std": ("MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]", "1.0, 1.0, 1.0"),
    "order": ("INPUT.FORMAT", "BGR", "config BGR, weights RGB"),
    "stride": ("MODEL.RESNETS.STRIDE_IN_1X1", "True", "config True, weights False"),
    "norm": ("MODEL.RESNETS.NORM", "GN", "config GN, weights FrozenBN"),
    "depth": ("MODEL.RESNETS.DEPTH", "101", "config 101, weights 50"),
    "groups": ("MODEL.RESNETS.NUM_GROUPS", "32", "config 32, weights 1"),
    "deformable": (
        "MODEL.RESNETS.DEFORM_ON_PER_STAGE",
        "[False, True, True, True]",
        "weights .False, False, False, False.",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_an_override_against_the_metadata(name: str) -> None:
    key, value, both = CONTRADICTIONS[name]
    with pytest.raises(ConfigError, match=f"{key}: .*{both}.*--force insists"):
        applied(metadata(), key, value)
    insisted = applied(metadata(), key, value, force=True)
    given = load_detection_config(FPN, [key, value])
    assert get_key(insisted, key) == get_key(given, key)


def test_an_override_that_says_the_same_is_no_contradiction() -> None:
    """Zoo configs are written for MSRA's weights: BGR, std 1, stride in the 1x1."""
    cfg = applied(metadata())
    assert cfg.INPUT.FORMAT == "RGB" and cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 is False and cfg.MODEL.RESNETS.NORM == "FrozenBN"
    assert cfg.MODEL.BACKBONE.FREEZE_AT == 2  # the zoo's, for every initialisation alike
    overrides = ("MODEL.PIXEL_STD", "[58.3950, 57.120, 57.375]", "INPUT.FORMAT", "RGB")
    assert applied(metadata(), *overrides) == cfg
    assert applied(metadata(), "MODEL.RESNETS.NORM", "SyncBN").MODEL.RESNETS.NORM == "SyncBN"
    with pytest.raises(ConfigError, match="MODEL.RESNETS.DEPTH.*INPUT.FORMAT"):  # all at once
        applied(metadata(), "INPUT.FORMAT", "BGR", "MODEL.RESNETS.DEPTH", "101")


def test_group_norm_stays_group_norm() -> None:
    said = metadata("MODEL.RESNETS.NORM", "GN")
    assert applied(said).MODEL.RESNETS.NORM == "GN"
    with pytest.raises(ConfigError, match="config FrozenBN, weights GN"):
        applied(said, "MODEL.RESNETS.NORM", "FrozenBN")


def test_another_network_is_refused_or_taken_over() -> None:
    """The zoo has no ResNet-18: --match-architecture makes one of its ResNet-50 configs."""
    said = metadata(*RESNET_18)
    with pytest.raises(ConfigError, match="DEPTH: config 50, weights 18.*--match-architecture"):
        applied(said)
    cfg = applied(said, match_architecture=True)
    assert (cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS) == (18, 64)
    with pytest.raises(ConfigError, match="DEPTH: config 50, weights 18"):
        applied(said, "MODEL.RESNETS.DEPTH", "50", match_architecture=True)


def test_new_offsets_must_be_a_plain_convolution_at_first() -> None:
    deform = ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", "[False, True, True, True]"]
    allow = ["MODEL.JIGSAW.NEW_OFFSETS", "True"]
    applied(metadata(), *deform, *allow)
    with pytest.raises(ConfigError, match="DEFORM_MODULATED: config True, weights False"):
        applied(metadata(), *deform, *allow, "MODEL.RESNETS.DEFORM_MODULATED", "True")
    both = [*deform, "MODEL.RESNETS.DEFORM_MODULATED", "True"]
    with pytest.raises(ConfigError, match="DEFORM_MODULATED: config False, weights True"):
        applied(metadata(*both), *deform)


class TestScratch:
    def test_random_weights_get_a_norm_that_trains_and_nothing_frozen(self) -> None:
        cfg = applied(SCRATCH_METADATA, name=C4)
        assert (cfg.MODEL.RESNETS.NORM, cfg.MODEL.BACKBONE.FREEZE_AT) == ("GN", 0)
        assert cfg.INPUT.FORMAT == "RGB" and cfg.MODEL.RESNETS.STRIDE_IN_1X1 is False

    @pytest.mark.parametrize(
        ("key", "value"), [("MODEL.RESNETS.NORM", "FrozenBN"), ("MODEL.BACKBONE.FREEZE_AT", "2")]
    )
    def test_what_cannot_train_is_refused(self, key: str, value: str) -> None:
        with pytest.raises(ConfigError, match=f"{key}: config {value}"):
            applied(SCRATCH_METADATA, key, value)

    def test_other_norms_that_train_are_the_users_choice(self) -> None:
        assert applied(SCRATCH_METADATA, "MODEL.RESNETS.NORM", "BN").MODEL.RESNETS.NORM == "BN"
        zoo = "Misc/scratch_mask_rcnn_R_50_FPN_9x_syncbn.yaml"
        assert applied(SCRATCH_METADATA, name=zoo).MODEL.RESNETS.NORM == "SyncBN"

    @pytest.mark.parametrize("word", ["none", ""])
    def test_is_asked_for_by_name(self, word: str) -> None:
        assert read_metadata(word).origin == "scratch"


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_gpu_is_fitted() -> None:
    settings = ["MODEL.RESNETS.NORM", "SyncBN", "MODEL.FPN.NORM", "SyncBN"]
    cfg = load_detection_config(FPN, [*settings, "SOLVER.AMP.ENABLED", "True"])
    fit_machine(cfg)
    assert (cfg.MODEL.DEVICE, cfg.MODEL.RESNETS.NORM, cfg.MODEL.FPN.NORM) == ("cpu", "BN", "BN")
    assert cfg.SOLVER.AMP.ENABLED is False

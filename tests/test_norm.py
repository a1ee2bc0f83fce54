"""norm.py: what "auto" becomes, and that nothing frozen gets through."""

import logging

import pytest
import torch
import torchvision
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import nn

from jigsaw_d2.config import check_trainable_config, get_jigsaw_cfg, resolve_norm
from jigsaw_d2.engine.state import average_statistics
from jigsaw_d2.io import ConfigError
from jigsaw_d2.modeling.trainable import check_trainable


def cfg_with(*options: str):
    return get_jigsaw_cfg("jigsaw_R_50.yaml", list(options))


@pytest.mark.parametrize(
    "device, world_size, batch, norm, expected",
    [
        ("cuda", 8, 512, "auto", "BN"),  # the paper: 64 images a GPU
        ("cuda", 8, 64, "auto", "SyncBN"),  # 8 images a GPU
        ("cuda", 1, 8, "auto", "BN"),
        ("cpu", 2, 8, "auto", "BN"),
        ("cpu", 1, 8, "SyncBN", "BN"),  # pain 4: SyncBN crashes on a CPU or one GPU
        ("cuda", 1, 8, "SyncBN", "BN"),
        ("cuda", 8, 64, "SyncBN", "SyncBN"),
        ("cpu", 2, 8, "GN", "GN"),
    ],
)
def test_norm_for_the_machine(device, world_size, batch, norm, expected):
    cfg = cfg_with(
        *("MODEL.DEVICE", device, "SOLVER.IMS_PER_BATCH", str(batch), "MODEL.RESNETS.NORM", norm)
    )
    assert resolve_norm(cfg, world_size) == expected


def test_the_choice_is_said(caplog):
    with caplog.at_level(logging.INFO, "jigsaw_d2.config"):
        resolve_norm(cfg_with("MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", "8"), 2)
    assert "MODEL.RESNETS.NORM auto -> BN (2 process(es) on CPU, 4 images each)" in caplog.text


def test_accumulation_makes_forward_passes_small():
    cfg = cfg_with("SOLVER.IMS_PER_BATCH", "512", "SOLVER.ACCUMULATION_STEPS", "8")
    assert resolve_norm(cfg, 8) == "SyncBN"  # 8 images a pass


def test_synchronised_norm_on_several_cpus_is_refused():
    cfg = cfg_with("MODEL.DEVICE", "cpu", "MODEL.RESNETS.NORM", "SyncBN")
    with pytest.raises(ConfigError, match="MODEL.RESNETS.NORM is SyncBN.*MODEL.DEVICE cpu"):
        resolve_norm(cfg, 2)


@pytest.mark.parametrize(
    "key, value",
    [
        ("MODEL.BACKBONE.FREEZE_AT", "2"),
        ("MODEL.RESNETS.NORM", "FrozenBN"),
        ("MODEL.RESNETS.OUT_FEATURES", "['res4']"),
    ],
)
def test_detectron2s_defaults_that_spoil_pretraining_are_named(key, value):
    with pytest.raises(ConfigError, match=key):
        check_trainable_config(cfg_with(key, value))


def test_shipped_config_is_trainable():
    check_trainable_config(cfg_with())


def test_frozen_layers_of_a_built_network_are_named():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), FrozenBatchNorm2d(4))
    with pytest.raises(ConfigError, match=r"1 frozen batch norms \(1 .*MODEL.RESNETS.NORM"):
        check_trainable(net)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    check_trainable(net)
    frozen = nn.Sequential(nn.Conv2d(3, 4, 1), torchvision.ops.FrozenBatchNorm2d(4))
    with pytest.raises(ConfigError, match="1 frozen batch norms"):  # whoever's it is
        check_trainable(frozen)
    net[0].weight.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"1 parameters without gradient \(0.weight"):
        check_trainable(net)


def test_a_pyramids_norm_is_handled_as_the_backbones():
    cfg = cfg_with("MODEL.DEVICE", "cuda", "SOLVER.IMS_PER_BATCH", "64", "MODEL.FPN.NORM", "auto")
    assert resolve_norm(cfg, 8, "FPN") == "SyncBN" and resolve_norm(cfg, 1, "FPN") == "BN"
    assert resolve_norm(cfg_with(), 1, "FPN") == ""  # Detectron2's pyramids have none
    features = ("MODEL.RESNETS.OUT_FEATURES", "['res4', 'res5']")
    pyramid = ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.FPN.NORM", "FrozenBN")
    pyramid += ("MODEL.FPN.IN_FEATURES", "['res4', 'res5']", *features, "MODEL.DEVICE", "cpu")
    cfg = cfg_with(*pyramid, "MODEL.JIGSAW.IN_FEATURES", "['p4', 'p5']")
    cfg.MODEL.RESNETS.NORM, cfg.MODEL.JIGSAW.NUM_CLASSES = "BN", 2
    with pytest.raises(ConfigError, match="4 frozen batch norms .backbone.fpn_lateral4.norm"):
        check_trainable(build_model(cfg))


def test_one_process_keeps_its_statistics():
    norm = nn.BatchNorm2d(2)
    norm.running_mean.fill_(3.0)
    average_statistics(norm)
    assert torch.equal(norm.running_mean, torch.full((2,), 3.0))

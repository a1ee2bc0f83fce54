"""The backbone of a LazyConfig, made to train, and through every command."""

import os
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, instantiate
from detectron2.modeling import build_backbone
from helpers_run import tiny_options
from helpers_weights import FPN, pretrain_config, save_checkpoint
from torch import nn

from jigsaw_d2.checkpoint.convert import convert_checkpoint
from jigsaw_d2.checkpoint.loading import load_backbone
from jigsaw_d2.checkpoint.reading import read_converted
from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.config_files import zoo_configs
from jigsaw_d2.detection.config import load_detection_config
from jigsaw_d2.detection.lazy import load_lazy_config
from jigsaw_d2.io import ConfigError
from jigsaw_d2.tools import erf, pretrain, visualize

MASK = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py"
C4 = "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.py"
REGNET = "COCO-InstanceSegmentation/mask_rcnn_regnetx_4gf_dds_fpn_1x.py"
# A detector of the zoo with a smaller backbone, as a user would write it.
OWN = f"""
from detectron2 import model_zoo
from detectron2.modeling.backbone.resnet import DeformBottleneckBlock
cfg = model_zoo.get_config({MASK!r})
model, dataloader, train = cfg.model, cfg.dataloader, cfg.train
model.backbone.bottom_up.stages.depth = 18
del model.backbone.bottom_up.stages["stride_in_1x1"]
"""
DEFORMS = """
model.backbone.bottom_up.stages.deform_modulated = True
model.backbone.bottom_up.stages.deform_num_groups = 2
"""


def lazy_config(program: str, *overrides: str) -> CfgNode:
    named = ("MODEL.BACKBONE.NAME", "build_lazy_backbone", "MODEL.JIGSAW.BACKBONE_FROM", program)
    return pretrain_config(*named, *overrides)


@pytest.fixture()
def own(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"


@pytest.mark.parametrize(
    ("program", "feature", "channels", "stride"),
    [(MASK, "res5", 2048, 32), (C4, "res5", 2048, 32), (REGNET, "s4", 1360, 32)],
)
def test_the_zoos(program: str, feature: str, channels: int, stride: int) -> None:
    """Frozen there up to res2 with FrozenBN; C4's res5 lies in its RoI heads."""
    cfg = lazy_config(program, "MODEL.RESNETS.NORM", "BN", "MODEL.JIGSAW.IN_FEATURE", feature)
    with torch.device("meta"):
        backbone = build_backbone(cfg)
    shape = backbone.output_shape()[feature]
    assert (shape.channels, shape.stride) == (channels, stride)
    assert all(p.requires_grad for p in backbone.parameters())
    assert {type(m).__name__ for m in backbone.modules() if "Norm" in type(m).__name__} == {
        "BatchNorm2d"
    }


def test_other_channels_and_a_detectors_norm(own: Path) -> None:
    cfg = lazy_config(
        str(own), "MODEL.PIXEL_MEAN", "[1, 2, 3, 4]", "MODEL.PIXEL_STD", "[1, 1, 1, 1]"
    )
    cfg.MODEL.RESNETS.NORM = "FrozenBN"
    backbone = build_backbone(cfg)
    assert backbone.stem.conv1.weight.shape == (64, 4, 7, 7)
    assert type(backbone.stem.conv1.norm).__name__ == "FrozenBatchNorm2d"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("gone.py", "gone.py: no LazyConfig"),
        ("", "no LazyConfig.*none at all"),
        (FPN, "no LazyConfig.*YAML"),
        ("Misc/torchvision_imagenet_R_50.py", "no model.backbone in it"),
        (REGNET, "features res5 of MODEL.JIGSAW.IN_FEATURE.*children: stem, s1, s2, s3, s4"),
    ],
)
def test_mistakes(program: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_backbone(lazy_config(program))


def test_a_name_that_leads_out_of_the_zoo_is_a_file(own: Path, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(
        f"MODEL: {{JIGSAW: {{BACKBONE_FROM: {os.path.relpath(own, zoo_configs())}}}}}\n"
    )
    with pytest.raises(ConfigError, match=r"x.yaml: refused.*own\.py is a program"):
        get_jigsaw_cfg(str(tmp_path / "x.yaml"))
    (tmp_path / "x.yaml").write_text(f"MODEL: {{JIGSAW: {{BACKBONE_FROM: {MASK}}}}}\n")
    assert get_jigsaw_cfg(str(tmp_path / "x.yaml")).MODEL.JIGSAW.BACKBONE_FROM == MASK


def test_the_whole_way(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named once; then the run's config and checkpoint know it, for --trust alone."""
    monkeypatch.chdir(tmp_path)
    # seconds of asking compilers for versions
    monkeypatch.setattr("detectron2.engine.defaults.collect_env_info", str)
    options = tiny_options(tmp_path, "SOLVER.MAX_ITER", 1, "SOLVER.BASE_LR", 0.001)
    options = options[: (at := options.index("MODEL.BACKBONE.NAME"))] + options[at + 2 :]
    started = ["--config-file", "jigsaw_R_50.yaml", "--backbone-from", "own.py", *options]
    assert pretrain.main(started) == 0
    config = str(tmp_path / "run" / "config.yaml")
    more = ["SOLVER.MAX_ITER", "2", "OUTPUT_DIR", str(tmp_path / "run")]
    monkeypatch.chdir("/")
    refused = r"refused.*own\.py is a program.*--trust"
    monkeypatch.setattr("jigsaw_d2.config_files._PROGRAMS", set())  # as in a new process
    for load in (get_jigsaw_cfg, load_detection_config):
        with pytest.raises(ConfigError, match=refused):
            load(config)
    with pytest.raises(ConfigError, match=f"model_final.pth: {refused}"):
        convert_checkpoint(tmp_path / "run", tmp_path / "w.pkl")
    assert not (tmp_path / "w.pkl").exists()
    named = ["--opts", "MODEL.JIGSAW.BACKBONE_FROM", str(own)]
    drawn = ["--config-file", config, "--weights", str(tmp_path / "run" / "model_final.pth")]
    drawn += ["--store", str(tmp_path / "store"), "--output", str(tmp_path / "l.png")]
    assert visualize.main(["labels", *drawn, *named]) == 0
    assert pretrain.main(["--config-file", config, "--trust", "--resume", *more]) == 0
    metadata = convert_checkpoint(tmp_path / "run", tmp_path / "w.pkl", trust=True)
    assert metadata.iterations == 2 and metadata.architecture.depth == 18
    arguments = ["--trust", "--feature", "res5", "--size", "64", "64", "--num-images", "1"]
    output = [
        "--weights",
        str(tmp_path / "w.pkl"),
        "--cells",
        "centre",
        "--output",
        str(tmp_path / "erf"),
    ]
    assert erf.main(["--config-file", config, *arguments, *output]) == 0
    model = instantiate(load_lazy_config(str(own), tmp_path / "w.pkl").model)
    report = load_backbone(model, tmp_path / "w.pkl")
    assert len(report.filled) == 100 and not report.mismatch


def test_the_stride_is_the_networks(tmp_path: Path) -> None:
    """The zoo's LazyConfigs stride in the 1x1; MODEL.RESNETS of the pre-training does not."""
    cfg = lazy_config(MASK, "MODEL.RESNETS.NORM", "BN")
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 is False
    model = nn.ModuleDict({"backbone": build_backbone(cfg)})
    convert_checkpoint(save_checkpoint(tmp_path / "c.pth", cfg, model), tmp_path / "w.pkl")
    _, metadata = read_converted(tmp_path / "w.pkl")
    assert metadata.required_config()["MODEL.RESNETS.STRIDE_IN_1X1"] is True
    said = metadata.network
    assert (said["backbone"], said["backbone_from"]) == ("build_lazy_backbone", MASK)


def test_how_it_deforms_is_the_networks(tmp_path: Path) -> None:
    """27 channels of offsets and masks of each of two groups: the shapes alone say three groups."""
    program = OWN.replace("stages.depth = 18", "stages.block_class = DeformBottleneckBlock")
    program = program.replace('del model.backbone.bottom_up.stages["stride_in_1x1"]', DEFORMS)
    (tmp_path / "deforms.py").write_text(program)
    cfg = lazy_config(str(tmp_path / "deforms.py"), "MODEL.RESNETS.NORM", "BN")
    model = nn.ModuleDict({"backbone": build_backbone(cfg)})
    checkpoint = save_checkpoint(tmp_path / "c.pth", cfg, model)
    convert_checkpoint(checkpoint, tmp_path / "w.pkl", trust=True)
    said = read_converted(tmp_path / "w.pkl")[1].architecture
    assert (said.deform_modulated, said.deform_num_groups) == (True, 2)
    assert said.deform_on_per_stage == (True,) * 4

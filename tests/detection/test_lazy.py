"""LazyConfigs: the weights' metadata reaches the model's and the mappers' nodes."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers_weights import RESNET_18, THIN, THIN_GN, convert, make_coco
from omegaconf import OmegaConf

from jigsaw_d2.checkpoint.loading import load_backbone
from jigsaw_d2.checkpoint.reading import read_converted
from jigsaw_d2.detection.lazy import build, load_lazy_config, write_plain_config
from jigsaw_d2.io import ConfigError, RunError, WeightsError
from jigsaw_d2.tools import convert as convert_weights
from jigsaw_d2.tools.finetune import main

MASK = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.py"
LSJ = "new_baselines/mask_rcnn_R_50_FPN_50ep_LSJ.py"
CONFIGS = [MASK, RETINANET, "COCO-Detection/fcos_R_50_FPN_1x.py"]
DEPTH = "model.backbone.bottom_up.stages.depth=18"
GN = [*THIN_GN, "MODEL.RESNETS.NORM", "GN"]
TOP = "model.backbone.top_block.in_channels=512"
SMALL = [
    *(DEPTH, "train.device=cpu", "train.max_iter=1", "train.eval_period=0"),
    *("dataloader.train.total_batch_size=1", "dataloader.train.num_workers=0"),
    "dataloader.test.num_workers=0",
    "dataloader.train.mapper.augmentations.0.short_edge_length=64",
    "dataloader.test.mapper.augmentations.0.short_edge_length=64",
]


@pytest.mark.parametrize("config", CONFIGS)
def test_what_the_weights_require_is_set(config: str, tmp_path: Path) -> None:
    """Detectron2's own values are those of MSRA's files."""
    weights = convert(tmp_path, *RESNET_18)
    cfg = load_lazy_config(config, weights, [DEPTH])
    stages = cfg.model.backbone.bottom_up.stages
    assert "stride_in_1x1" not in stages and stages.norm == "FrozenBN"
    assert cfg.model.pixel_std == [58.395, 57.12, 57.375]
    assert cfg.dataloader.train.mapper.image_format == "RGB"
    assert cfg.dataloader.test.mapper.image_format == "RGB"
    model = instantiate(cfg.model)
    report = load_backbone(model, weights)
    assert len(report.filled) == 20 * 5 and not report.mismatch  # 20 convolutions with their norms


def test_overrides_against_the_weights(tmp_path: Path) -> None:
    weights = convert(tmp_path, *RESNET_18)
    wrong = [DEPTH, "model.pixel_std=[1.0,1.0,1.0]", "model.input_format=BGR"]
    with pytest.raises(ConfigError, match="model.input_format: config BGR, weights RGB; model.pix"):
        load_lazy_config(MASK, weights, wrong)
    model = instantiate(load_lazy_config(MASK, weights, wrong, force=True).model)
    with pytest.raises(WeightsError, match="(?s)pixel_std: file .*input_format: file RGB"):
        load_backbone(model, weights)  # who insists is told again
    with pytest.raises(WeightsError, match="DEPTH: file 18, network 50"):
        load_backbone(instantiate(load_lazy_config(RETINANET, weights).model), weights)


def test_strides_and_the_c4_head(tmp_path: Path) -> None:
    cfg = load_lazy_config(
        "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.py", convert(tmp_path, *GN)
    )
    nodes = (cfg.model.backbone.stages, cfg.model.roi_heads.res5)
    assert [node.stride_in_1x1 for node in nodes] == [False, False]
    assert [node.norm for node in (*nodes, cfg.model.backbone.stem)] == ["GN"] * 3


@pytest.mark.parametrize("command", [convert_weights.main, main])
def test_a_config_for_detectron2s_own_script(command: Callable, tmp_path: Path) -> None:
    """Loaded without us it is what we train by: values, lists, sets, what had to go."""
    weights, out = convert(tmp_path, *RESNET_18), str(tmp_path / "out.py")
    entry = make_coco(tmp_path / f"plain_{command.__module__.rpartition('.')[2]}")[0]
    own = f"+DATASETS.COCO_FILES={json.dumps([entry])}"
    overrides = [*SMALL, own, f"dataloader.train.dataset.names={entry[0]}"]
    files = ["--weights", str(weights)]
    if command is convert_weights.main:
        weights = tmp_path / "again.pkl"
        files = ["--input", files[1], "--output", str(weights)]
    assert command([*files, "--config-file", MASK, "--write-config", out, *overrides]) == 0
    with pytest.raises(ConfigError, match="exists; --force"):
        command([*files, "--config-file", MASK, "--write-config", out])
    expected = load_lazy_config(MASK, weights, overrides)
    del expected["DATASETS"]
    DatasetCatalog.remove(entry[0]), MetadataCatalog.remove(entry[0])  # the file registers it
    cfg = LazyConfig.load(out)
    plain = [OmegaConf.to_container(c, resolve=False) for c in (cfg, expected)]
    assert plain[0] == plain[1] and len(DatasetCatalog.get(entry[0])) == 4
    assert cfg.model.roi_heads.num_classes == 3 and cfg.train.init_checkpoint == str(weights)
    model = instantiate(cfg.model)
    DetectionCheckpointer(model).load(cfg.train.init_checkpoint)
    filled = load_backbone(copy.deepcopy(model), weights).filled
    held = read_converted(weights)[0]
    assert len(filled) == len(held) == 100
    for name, array in held.items():
        assert np.array_equal(model.backbone.bottom_up.state_dict()[name], array), name


def test_what_is_no_plain_value_stays_with_the_config(tmp_path: Path) -> None:
    """The zoo's new baselines hold functions, which no line of Python could spell."""
    changes = write_plain_config(str(tmp_path / "out.py"), LSJ, convert(tmp_path, *THIN))
    assert "conv_norm" not in changes and "<" not in changes
    cfg = LazyConfig.load(str(tmp_path / "out.py"))
    assert cfg.model.pixel_std == [58.395, 57.12, 57.375]
    assert callable(cfg.model.roi_heads.box_head.conv_norm)


def test_no_lazy_config(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("x = nothing\n")
    (tmp_path / "empty.py").write_text("x = 3\n")
    with pytest.raises(ConfigError, match="norms that train"):
        load_lazy_config(MASK, "none")
    for name, message in (("broken.py", "nothing"), ("empty.py", "no model"), ("gone.py", "gone")):
        with pytest.raises(ConfigError, match=f"{name}: no .*{message}|{name}: {message}"):
            load_lazy_config(str(tmp_path / name), "none")
    cfg = OmegaConf.create({"model": {"_target_": "torch.nn.Conv2d", "in_channels": 3}})
    with pytest.raises(ConfigError, match="own.py: its model cannot be built: .*out_channels"):
        build(cfg, "model", "own.py")


def test_train_and_evaluate(tmp_path: Path) -> None:
    """By the command, on one's own set, whose classes the model takes; --resume starts it, too."""
    weights = convert(tmp_path, *RESNET_18)
    name, json_file, images = make_coco(tmp_path / "lazy_data")[0]
    own = [f'+DATASETS.COCO_FILES=[["{name}","{json_file}","{images}"]]']
    own += [f"dataloader.{split}.dataset.names={name}" for split in ("train", "test")]
    files = ["--config-file", RETINANET, "--weights", str(weights)]
    overrides = [*SMALL, *own, f"train.output_dir={tmp_path / 'out'}", TOP]
    with pytest.raises(ConfigError, match="num_classes: config 5, dataset .* has 3: cell"):
        main([*files, *overrides, "model.num_classes=5"])
    gone = "dataloader.train.dataset.names=gone"
    with pytest.raises(ConfigError, match=f"no set 'gone' is registered; .* has {name}"):
        main([*files, *overrides, gone])
    with pytest.raises(ConfigError, match=f"{RETINANET}: its dataloader.train .*'gone'"):
        main([*files, *SMALL, TOP, gone, f"train.output_dir={tmp_path / 'gone'}"])
    with pytest.raises(RunError, match="no checkpoint to evaluate"):
        main([*files, "--eval-only", *overrides])
    for steps in (1, 2):
        more = (f"train.max_iter={steps}", f"train.eval_period={steps}")
        assert main([*files, "--resume", *overrides, *more]) == 0
    log = (tmp_path / "out" / "log.txt").read_text()
    assert log.count("all 100 tensors of the backbone loaded") == 1
    assert log.count("copypaste: AP,AP50") == 2
    state = torch.load(tmp_path / "out" / "model_final.pth", weights_only=False)
    assert state["iteration"] == 1 and state["model"]["head.cls_score.weight"].shape[0] == 9 * 3


@pytest.mark.parametrize("command", [convert_weights.main, main])
def test_a_flag_for_yaml_configs_alone(command: Callable, capsys: pytest.CaptureFixture) -> None:
    files = ["--weights", "w.pkl"]
    if command is convert_weights.main:
        files = ["--input", "w.pth", "--output", "w.pkl", "--write-config", "out.py"]
    with pytest.raises(SystemExit):
        command([*files, "--config-file", MASK, "--match-architecture"])
    assert "is for YAML configs" in capsys.readouterr().err

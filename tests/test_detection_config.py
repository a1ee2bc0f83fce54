"""Where detection configs come from, and what differs between two."""

from pathlib import Path

import pytest
import yaml
from helpers_weights import C4, FPN

from jigsaw_d2.detection.detection_config import (
    DetectionConfigError,
    changes_yaml,
    config_changes,
    get_key,
    load_detection_config,
    set_key,
)


def test_a_zoo_name_a_shipped_name_and_a_path(tmp_path: Path) -> None:
    assert load_detection_config(C4).MODEL.ROI_HEADS.NAME == "Res5ROIHeads"
    ours = load_detection_config("finetune/faster_rcnn_R_50_C4_1x.yaml")
    assert ours.MODEL.ROI_HEADS.NAME == "Res5ROIHeads" and ours.SOLVER.MAX_ITER == 95280
    (tmp_path / "mine.yaml").write_text("SOLVER:\n  MAX_ITER: 7\nVERSION: 2\n")
    assert load_detection_config(str(tmp_path / "mine.yaml")).SOLVER.MAX_ITER == 7


def test_a_zoo_base_lies_under_all_else_wherever_the_file_is(tmp_path: Path) -> None:
    """Own keys over the _BASE_ file's over the zoo's."""
    (tmp_path / "base.yaml").write_text("SOLVER:\n  MAX_ITER: 7\n  BASE_LR: 0.5\nVERSION: 2\n")
    (tmp_path / "leaf.yaml").write_text(
        f'_ZOO_BASE_: "{FPN}"\n_BASE_: "base.yaml"\nSOLVER:\n  BASE_LR: 0.25\n'
    )
    cfg = load_detection_config(str(tmp_path / "leaf.yaml"), ["SOLVER.GAMMA", "0.5"])
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.SOLVER.GAMMA) == (7, 0.25, 0.5)
    assert cfg.SOLVER.STEPS == (60000, 80000)  # the zoo's
    assert cfg.MODEL.BACKBONE.NAME == "build_resnet_fpn_backbone"


def test_configs_that_evaluate_expressions(tmp_path: Path) -> None:
    """Detectron2's RetinaNet has such; so may a user's."""
    cfg = load_detection_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    assert len(cfg.MODEL.ANCHOR_GENERATOR.SIZES[0]) == 3


def test_old_configs_are_upgraded_as_detectron2_does(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text("MODEL:\n  WEIGHT: x.pkl\n")  # v1's name for WEIGHTS
    assert load_detection_config(str(tmp_path / "old.yaml")).MODEL.WEIGHTS == "x.pkl"


def test_unknown_names_and_overrides(tmp_path: Path) -> None:
    (tmp_path / "odd.yaml").write_text("COLOUR: red\nVERSION: 2\n")
    with pytest.raises(DetectionConfigError, match="odd.yaml: no detection config.*COLOUR"):
        load_detection_config(str(tmp_path / "odd.yaml"))
    with pytest.raises(DetectionConfigError, match="no config 'nothing.yaml': not a file"):
        load_detection_config("nothing.yaml")
    with pytest.raises(DetectionConfigError, match="a LazyConfig"):
        load_detection_config("COCO-Detection/retinanet_R_50_FPN_1x.py")
    (tmp_path / "bad.yaml").write_text("A: [1\n")
    with pytest.raises(DetectionConfigError, match="bad.yaml: no detection config"):
        load_detection_config(str(tmp_path / "bad.yaml"))
    with pytest.raises(DetectionConfigError, match="NO.SUCH"):
        load_detection_config(FPN, ["NO.SUCH", "1"])
    with pytest.raises(DetectionConfigError, match="MAX_ITER"):
        load_detection_config(FPN, ["SOLVER.MAX_ITER", "many"])
    with pytest.raises(DetectionConfigError, match="overrides"):
        load_detection_config(FPN, ["SOLVER.MAX_ITER"])


def test_changes_between_two_configs() -> None:
    before = load_detection_config(FPN)
    after = before.clone()
    set_key(after, "MODEL.RESNETS.STRIDE_IN_1X1", False)
    set_key(after, "MODEL.PIXEL_STD", [1, 2, 3])
    after.MODEL.NEW = "key"
    changes = config_changes(before, after)
    assert changes == {
        "MODEL": {"RESNETS": {"STRIDE_IN_1X1": False}, "PIXEL_STD": [1, 2, 3], "NEW": "key"}
    }
    assert yaml.safe_load(changes_yaml(changes)) == changes
    assert changes_yaml(config_changes(before, before)) == "{}\n"
    assert get_key(after, "MODEL.RESNETS.STRIDE_IN_1X1") is False

"""A detector of a project's own, registered by --register: strictly loaded, trained, evaluated."""

import json
from pathlib import Path

import helpers_detr  # noqa: F401  (registers TinyDetr)
import pytest
from helpers_weights import (
    FPN,
    SMALL,
    THIN,
    build_detector,
    convert,
    make_coco,
    small_detection_config,
)

from jigsaw_d2.checkpoint.loading import load_backbone
from jigsaw_d2.detection.config import SCRATCH_METADATA
from jigsaw_d2.io import WeightsError
from jigsaw_d2.tools.finetune import main

OWN = [
    *("MODEL.META_ARCHITECTURE", "TinyDetr", "MODEL.BACKBONE.NAME", "build_resnet_backbone"),
    *("MODEL.RESNETS.OUT_FEATURES", "['res5']", "SOLVER.OPTIMIZER", "AdamW"),
    *("SOLVER.LAYER_DECAY", "0.9", "SOLVER.BASE_LR", "0.0001", "SOLVER.MAX_ITER", "2", "SEED", "1"),
]


def settings(folder: Path, *more: str) -> list[str]:
    files = make_coco(folder / "detr_data")
    sets = str((files[0][0],))
    data = ["DATASETS.COCO_FILES", str(files), "DATASETS.TRAIN", sets, "DATASETS.TEST", sets]
    return [*SMALL, *THIN, *data, *OWN, "OUTPUT_DIR", str(folder / "out"), *more]


def test_a_small_detr(tmp_path: Path) -> None:
    weights = convert(tmp_path, *THIN)
    arguments = ["--config-file", FPN, "--weights", str(weights), "--register", "helpers_detr"]
    assert main([*arguments, *settings(tmp_path)]) == 0
    out = tmp_path / "out"
    assert "all 265 tensors of the backbone loaded" in (out / "log.txt").read_text()
    assert "AP-plate" in json.loads((out / "results.json").read_text())["bbox"]
    assert json.loads((out / "cost.json").read_text())["stages"]["finetuning"]["images"] == 2


def test_another_backbone_is_refused(tmp_path: Path) -> None:
    """Its tensors are found by their names under any prefix, and what is missing is."""
    cfg = small_detection_config(FPN, *THIN, *OWN, "MODEL.RESNETS.STRIDE_IN_1X1", "False")
    cfg.merge_from_list(
        [str(x) for pair in SCRATCH_METADATA.required_config().items() for x in pair]
    )
    cfg.MODEL.RESNETS.NORM, cfg.MODEL.RESNETS.DEPTH = "FrozenBN", 101
    with pytest.raises(WeightsError, match="DEPTH: file 50, network 101"):
        load_backbone(build_detector(cfg), convert(tmp_path, *THIN))

"""Every detection row of the paper's tables: its numbers, its network, one step of it on a CPU."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.utils.events import EventStorage
from helpers_weights import SMALL, THIN, THIN_GN, convert, make_coco, rewrite

from jigsaw_d2.checkpoint.metadata import Architecture
from jigsaw_d2.checkpoint.reading import METADATA_KEY
from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.config_files import config_dir
from jigsaw_d2.detection.config import get_key, load_detection_config, setup_finetune
from jigsaw_d2.detection.finetune import FinetuneTrainer
from jigsaw_d2.io import ConfigError

ROWS = sorted(
    path.stem
    for origin in ("jigsaw", "imagenet", "scratch")
    for path in (config_dir() / "finetune").glob(f"*_{origin}.yaml")
)
# Every row of digest P5: Table 3 (three detectors, two origins), Table 4 (two networks, two
# origins), Table 5 (scratch twice, Jigsaw 2x; Jigsaw 1x is Table 3's), Fig. 8 (four more variants).
EXPECTED_ROWS = 3 * 2 + 2 * 2 + 3 + 4 * 2
EPOCH = 117266 / 16  # iterations: images of train2017 with annotations, batch 16
DCN = ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", "[False, True, True, True]"]
R101 = ["MODEL.RESNETS.DEPTH", "101"]
X101 = [*R101, "MODEL.RESNETS.NUM_GROUPS", "32", "MODEL.RESNETS.WIDTH_PER_GROUP", "4"]
NARROW = ["MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "32"]


def pretraining(row: str) -> tuple[str, list[str]]:
    """The shipped config that makes the row's weights, and what it changes in ours of R50."""
    if "X_101" in row:
        return "jigsaw_X_101_32x4d.yaml", X101
    if "R_101" in row:
        return "jigsaw_R_101.yaml", R101
    if "dcn" in row:
        return "jigsaw_R_50_DCN.yaml", [] if "imagenet" in row else DCN
    return "jigsaw_R_50.yaml", []


def epochs(row: str) -> tuple[float, float, float]:
    """(first decay, second decay, end)."""
    total = {"6x": 78, "2x": 26, "1x": 13}[
        next(p for p in row.split("_") if p in ("1x", "2x", "6x"))
    ]
    if "scratch" in row:  # equal total cost, see the files
        total = {13: 19, 26: 33}[total]
    return total * 9 / 13, total * 12 / 13, total


@pytest.mark.parametrize("row", ROWS)
def test_numbers(row: str) -> None:
    """Sec. 4.1, to the nearest ten iterations: the paper's 1x is 95,280."""
    assert len(ROWS) == EXPECTED_ROWS
    cfg = load_detection_config(f"finetune/{row}.yaml")
    solver = cfg.SOLVER
    first, second, end = (round(e * EPOCH / 10) * 10 for e in epochs(row))
    assert (solver.STEPS, solver.MAX_ITER) == ((first, second), end)
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.GAMMA) == (16, 0.02, 0.1)
    assert (solver.MOMENTUM, solver.WEIGHT_DECAY) == (0.9, 0.0001)
    several_scales = "ms_train" in row
    assert (len(cfg.INPUT.MIN_SIZE_TRAIN) > 1) == several_scales
    assert max(cfg.INPUT.MIN_SIZE_TRAIN) == 800 and cfg.INPUT.MAX_SIZE_TRAIN == 1333
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (800, 1333)
    assert cfg.INPUT.RANDOM_FLIP == "horizontal"
    assert cfg.TEST.AUG.ENABLED == ("ms_" in row)
    assert cfg.MODEL.MASK_ON == row.startswith("mask")
    assert cfg.DATASETS.TRAIN == ("coco_2017_train",) and cfg.DATASETS.TEST == ("coco_2017_val",)
    assert cfg.MODEL.JIGSAW.ORIGIN == row.rpartition("_")[2]
    assert cfg.OUTPUT_DIR == f"output/finetune/{row}"


@pytest.mark.parametrize("row", ROWS)
def test_network_at_full_size(row: str) -> None:
    """Key by key the network of the shipped pre-training config."""
    cfg = load_detection_config(f"finetune/{row}.yaml")
    assert ("C4" in row) == (cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeads")
    if "scratch" in row:
        assert (cfg.MODEL.RESNETS.NORM, cfg.MODEL.BACKBONE.FREEZE_AT) == ("GN", 0)
        return
    needed = Architecture.from_config(get_jigsaw_cfg(pretraining(row)[0]).MODEL).required_config()
    assert cfg.MODEL.JIGSAW.NEW_OFFSETS == row.endswith("dcn_1x_imagenet")
    assert {key: get_key(cfg, key) for key in needed} == needed
    assert cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE == [False, *["dcn" in row] * 3]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, list[str]], str]:
    """Weights for a row: converted once for all rows that start from the same."""

    @functools.cache
    def make(origin: str, *overrides: str) -> str:
        weights = convert(tmp_path_factory.mktemp(origin), *overrides)
        if origin == "imagenet":  # which differ from ours in the metadata alone
            rewrite(weights, lambda data: data[METADATA_KEY].update(origin=origin), seal=True)
        return str(weights)

    return lambda row, narrow: make(row.rpartition("_")[2], *pretraining(row)[1], *narrow)


@pytest.mark.parametrize("row", ROWS)
def test_one_step(row: str, tmp_path: Path, converted: Callable[[str, list[str]], str]) -> None:
    """From a converted file (or none) of the row's narrowed network; every loss is finite."""
    files = make_coco(tmp_path / row, masks="mask" in row)
    narrow = THIN_GN if "scratch" in row else NARROW if "X_101" in row else THIN
    weights = "none" if "scratch" in row else converted(row, narrow)
    overrides = [*SMALL, *narrow, "DATASETS.COCO_FILES", str(files), "SOLVER.MAX_ITER", "1"]
    overrides += ["DATASETS.TRAIN", f"('{files[0][0]}',)", "DATASETS.TEST", "()"]
    overrides += ["OUTPUT_DIR", str(tmp_path / "out")]
    cfg = setup_finetune(f"finetune/{row}.yaml", weights, overrides)
    other = converted("_jigsaw", THIN) if "scratch" in row else "none"
    with pytest.raises(ConfigError, match=f"ORIGIN is '{cfg.MODEL.JIGSAW.ORIGIN}', but the weig"):
        setup_finetune(f"finetune/{row}.yaml", other, overrides)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3 and cfg.INPUT.FORMAT == "RGB"
    assert cfg.MODEL.RESNETS.NORM == ("GN" if "scratch" in row else "FrozenBN")
    trainer = FinetuneTrainer(cfg)
    trainer.resume_or_load(resume=False)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    with EventStorage() as storage:
        trainer.iter = 0
        trainer.run_step()  # stops at a loss that is not finite
    assert {"loss_cls", "loss_rpn_cls"} <= set(storage.latest())
    assert ("loss_mask" in storage.latest()) == row.startswith("mask")
    moved = [
        n for n, value in trainer.model.named_parameters() if not torch.equal(value, before[n])
    ]
    assert any(".res4." in name for name in moved)
    frozen = [name for name in moved if "stem" in name or ".res2." in name]
    assert bool(frozen) == ("scratch" in row)

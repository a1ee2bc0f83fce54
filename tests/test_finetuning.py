"""Fine-tuning by command and by library: train, stop, resume, evaluate, at several scales."""

import json
from pathlib import Path

import pytest
import torch
from helpers_weights import (
    C4,
    FPN,
    MASK,
    RETINANET,
    SMALL,
    THIN,
    convert,
    make_coco,
)

from jigsaw_d2.commands.finetune import main
from jigsaw_d2.cost import read_ledger
from jigsaw_d2.detection.finetune_config import FinetuneConfigError, setup_finetune
from jigsaw_d2.detection.finetuning import FinetuneError, finetune
from jigsaw_d2.io import DataError as DatasetError
from jigsaw_d2.weights.backbone_loading import BackboneMismatchError


@pytest.fixture()
def weights(tmp_path: Path) -> Path:
    return convert(tmp_path, *THIN)


def data(tmp_path: Path, name: str, masks: bool = True) -> list[str]:
    files = make_coco(tmp_path / name, masks=masks)
    sets = str((files[0][0],))
    return ["DATASETS.COCO_FILES", str(files), "DATASETS.TRAIN", sets, "DATASETS.TEST", sets]


# Two small steps learn nothing and break nothing; without a threshold some boxes are scored.
SHORT = ["SOLVER.BASE_LR", "0.0001"]
SHORT += ["SOLVER.MAX_ITER", "2", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "SEED", "1"]


@pytest.mark.parametrize(("config", "tasks"), [(C4, {"bbox"}), (MASK, {"bbox", "segm"})])
def test_train_and_evaluate(config: str, tasks: set, weights: Path, tmp_path: Path, capsys) -> None:
    """What the user gets: changes as YAML, the full config, AP per class, passport, ledger."""
    settings = [*SMALL, *THIN, *SHORT, *data(tmp_path, f"whole_{len(tasks)}")]
    arguments = ["--config-file", config, "--weights", str(weights), *settings]
    assert main([*arguments, "OUTPUT_DIR", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "PIXEL_STD: [58.395, 57.12, 57.375]" in said and "FORMAT: RGB" in said
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    assert set(results) == tasks
    assert {"AP", "AP50", "AP-cell", "AP-plate", "AP-rod"} <= set(results["bbox"])
    config_text = (out / "config.yaml").read_text()
    assert "NUM_CLASSES: 3" in config_text and f"WEIGHTS: {weights}" in config_text
    assert (out / "passport.yaml").read_text() == weights.with_name("weights.pkl.yaml").read_text()
    assert "all 265 tensors of the backbone loaded" in (out / "log.txt").read_text()
    assert "new, with random weights" in (out / "log.txt").read_text()
    stages = read_ledger(out)["stages"]
    assert (stages["finetuning"]["images"], stages["evaluation"]["images"]) == (2, 4)
    assert stages["finetuning"]["flops"] > 3 * stages["evaluation"]["flops"] / 2 * 0.9
    assert stages["finetuning"]["pixels"] == 2 * 64 * 64


def test_stop_and_resume(weights: Path, tmp_path: Path) -> None:
    """A run is never started over; resumed, it goes on from its last checkpoint to the same end."""
    settings = [*SMALL, *THIN, *SHORT, *data(tmp_path, "resumed")]
    cfg = setup_finetune(FPN, weights, [*settings, "OUTPUT_DIR", str(tmp_path / "out")])
    finetune(cfg)
    with pytest.raises(FinetuneError, match="holds a run already: --resume"):
        finetune(cfg)
    cfg.SOLVER.MAX_ITER = 4
    finetune(cfg, resume=True)
    lines = (tmp_path / "out" / "metrics.json").read_text().splitlines()
    steps = [json.loads(line) for line in lines if "total_loss" in line]
    assert [step["iteration"] for step in steps] == [1, 3]
    assert read_ledger(tmp_path / "out")["stages"]["finetuning"]["images"] == 4
    other = convert(tmp_path, *THIN, name="other.pkl", seed=5)
    cfg.MODEL.WEIGHTS = str(other)
    with pytest.raises(FinetuneError, match="started from other weights"):
        finetune(cfg, resume=True)


def test_evaluation_alone(weights: Path, tmp_path: Path) -> None:
    settings = [*SMALL, *THIN, *SHORT, *data(tmp_path, "evaluated")]
    cfg = setup_finetune(FPN, weights, [*settings, "OUTPUT_DIR", str(tmp_path / "out")])
    with pytest.raises(FinetuneError, match="no checkpoint to evaluate"):
        finetune(cfg, eval_only=True)
    trained = finetune(cfg)
    assert finetune(cfg, eval_only=True)["bbox"]["AP50"] == pytest.approx(trained["bbox"]["AP50"])


def test_several_scales_at_test_time(weights: Path, tmp_path: Path) -> None:
    scales = [
        "TEST.AUG.ENABLED",
        "True",
        "TEST.AUG.MIN_SIZES",
        "(48, 64)",
        "TEST.AUG.MAX_SIZE",
        "96",
    ]
    settings = [*SMALL, *THIN, *SHORT, *data(tmp_path, "scaled"), *scales]
    cfg = setup_finetune(FPN, weights, [*settings, "OUTPUT_DIR", str(tmp_path / "out")])
    assert set(finetune(cfg)) == {"bbox", "bbox_TTA"}
    # Plain: 4 images. Augmented: 4 images x 2 scales x 2 flips.
    assert read_ledger(tmp_path / "out")["stages"]["evaluation"]["images"] == 4 + 16
    cfg = setup_finetune(RETINANET, weights, [*settings, "OUTPUT_DIR", str(tmp_path / "retina")])
    with pytest.raises(FinetuneError, match="RetinaNet at one scale only"):
        finetune(cfg)


def test_from_scratch(tmp_path: Path) -> None:
    """Random weights, batch norm that trains, nothing frozen: every parameter moves."""
    settings = [*SMALL, *THIN, *SHORT, *data(tmp_path, "scratch"), "MODEL.RESNETS.NORM", "BN"]
    settings += ["SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.WARMUP_ITERS", "0"]
    settings += ["SOLVER.BASE_LR", "0.01"]
    cfg = setup_finetune(FPN, "none", [*settings, "OUTPUT_DIR", str(tmp_path / "out")])
    finetune(cfg)
    one, two = (
        torch.load(tmp_path / "out" / f"model_000000{i}.pth", weights_only=True)["model"]
        for i in (0, 1)
    )
    still = [
        k for k in one if "bottom_up" in k and k.endswith("weight") and torch.equal(one[k], two[k])
    ]
    assert not still


def test_weights_of_another_network_stop_the_run(weights: Path, tmp_path: Path) -> None:
    settings = [
        *SMALL,
        *THIN,
        *SHORT,
        *data(tmp_path, "other_network"),
        "MODEL.RESNETS.DEPTH",
        "101",
    ]
    settings += ["OUTPUT_DIR", str(tmp_path / "out")]
    with pytest.raises(FinetuneConfigError, match="config 101, weights 50"):
        setup_finetune(FPN, weights, settings)
    cfg = setup_finetune(FPN, weights, settings, force=True)
    with pytest.raises(BackboneMismatchError, match="res4.22"):
        finetune(cfg)


def test_a_detector_that_detectron2_lacks(tmp_path: Path) -> None:
    deform = ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", "[False, True, True, True]"]
    weights = convert(tmp_path, *THIN, *deform)
    settings = [*SMALL, *THIN, *SHORT, *deform, *data(tmp_path, "deformable")]
    cfg = setup_finetune(C4, weights, [*settings, "OUTPUT_DIR", str(tmp_path / "out")])
    with pytest.raises(FinetuneError, match="cannot build.*not yet supported in res5"):
        finetune(cfg)


def test_masks_without_segmentation_stop_the_run(weights: Path, tmp_path: Path) -> None:
    settings = [*SMALL, *THIN, *SHORT, *data(tmp_path, "maskless", masks=False)]
    cfg = setup_finetune(MASK, weights, [*settings, "OUTPUT_DIR", str(tmp_path / "out")])
    with pytest.raises(DatasetError, match="no segmentation"):
        finetune(cfg)

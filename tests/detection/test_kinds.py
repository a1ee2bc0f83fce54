"""Detectors of other kinds: they train a step and are scored, or it is said why not."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.evaluation import PascalVOCDetectionEvaluator
from helpers_weights import SMALL, THIN, convert, make_coco, small_detection_config

from jigsaw_d2.detection.finetune import FastCOCOEvaluator
from jigsaw_d2.detection.kinds import build_evaluators, fit_kind
from jigsaw_d2.io import ConfigError, DataError
from jigsaw_d2.tools.finetune import main

KEYPOINT = "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml"
PANOPTIC = "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml"
FAST = "COCO-Detection/fast_rcnn_R_50_FPN_1x.yaml"
LVIS = "LVISv1-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
VOC = "PascalVOC-Detection/faster_rcnn_R_50_FPN.yaml"
CITYSCAPES = "Cityscapes/mask_rcnn_R_50_FPN.yaml"


def settings(folder: Path, files: list, *more: str) -> list[str]:
    sets = str((files[0][0],))
    data = ["DATASETS.COCO_FILES", str(files), "DATASETS.TRAIN", sets, "DATASETS.TEST", sets]
    short = ["SOLVER.BASE_LR", "0.0001", "SOLVER.MAX_ITER", "1", "SEED", "1"]
    short += ["SOLVER.STEPS", "()", "OUTPUT_DIR", str(folder / "out"), "TEST.EVAL_PERIOD", "0"]
    return [*SMALL, *THIN, *short, *data, *more]


def fine_tune(config: str, folder: Path, options: list[str]) -> dict:
    weights = convert(folder, *THIN)
    assert main(["--config-file", config, "--weights", str(weights), *options]) == 0
    return json.loads((folder / "out" / "results.json").read_text())


def with_keypoints(files: list, names: list[str]) -> list:
    """Two joints in each box, of the one person class; the json's categories name them."""
    path = Path(files[0][1])
    content = json.loads(path.read_text())
    for entry in content["annotations"]:
        x, y, w, h = entry["bbox"]
        joints = [x + 2, y + 2, 2, x + w - 2, y + h - 2, 2]
        entry |= {"category_id": 1, "keypoints": joints, "num_keypoints": 2}
    content["categories"] = [{"id": 1, "name": "cell", "keypoints": names}]
    path.write_text(json.dumps(content))
    return files


def test_keypoints_of_ones_own(tmp_path: Path) -> None:
    """Names, mirror and number follow from the json."""
    files = with_keypoints(make_coco(tmp_path / "joints"), ["left_end", "right_end"])
    small = ["MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(8,)"]
    small += ["MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE", "1"]
    results = fine_tune(KEYPOINT, tmp_path, settings(tmp_path, files, *small))
    assert set(results) == {"bbox", "keypoints"}
    saved = (tmp_path / "out" / "config.yaml").read_text()
    assert "NUM_KEYPOINTS: 2" in saved and "left_end" in saved
    metadata = MetadataCatalog.get(files[0][0])
    assert metadata.keypoint_flip_map == [("left_end", "right_end")]


@pytest.mark.parametrize("config", [LVIS, VOC, CITYSCAPES])
def test_configs_of_other_sets_train_and_are_scored_as_cocos(config: str, tmp_path: Path) -> None:
    files = make_coco(tmp_path / f"own_{config.split('/')[0]}")
    results = fine_tune(config, tmp_path, settings(tmp_path, files))
    assert "AP-cell" in results["bbox"] and ("segm" in results) is (config != VOC)


def panoptic_set(folder: Path, kind: str) -> str:
    """A registered set with semantic masks beside its boxes."""
    name, json_file, images = make_coco(folder / f"panoptic_{kind}")[0]

    def load() -> list[dict]:
        records = load_coco_json(json_file, images, name)
        for record in records:
            record["sem_seg_file_name"] = record["file_name"] + ".mask.png"
            mask = np.zeros((64, 64), np.uint8)
            mask[20:] = 1
            cv2.imwrite(record["sem_seg_file_name"], mask)
        return records

    DatasetCatalog.register(name, load)
    metadata = {"thing_classes": ["cell", "plate", "rod"], "stuff_classes": ["things", "floor"]}
    MetadataCatalog.get(name).set(evaluator_type=kind, json_file=json_file, **metadata)
    return name


def test_panoptic(tmp_path: Path) -> None:
    name = panoptic_set(tmp_path, "coco")
    own = ["DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", f"('{name}',)"]
    own += ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "2", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "32"]
    options = [*settings(tmp_path, [["unused", "", ""]]), "DATASETS.COCO_FILES", "[]", *own]
    assert {"bbox", "segm"} <= set(fine_tune(PANOPTIC, tmp_path, options))


# ---- what is said before the first step


def refused(config: str, files: list, *more: str) -> str:
    sets = str(tuple(entry[0] for entry in files))
    data = ["DATASETS.COCO_FILES", str(files), "DATASETS.TRAIN", sets, "DATASETS.TEST", sets]
    with pytest.raises((ConfigError, DataError)) as error:
        fit_kind(small_detection_config(config, *data, *more))
    return str(error.value)


def test_what_a_set_lacks(tmp_path: Path) -> None:
    files = make_coco(tmp_path / "plain")
    assert "has no semantic masks" in refused(PANOPTIC, files)
    assert "trains keypoints, of which its annotations have no" in refused(KEYPOINT, files)
    message = refused(FAST, files, "DATASETS.PROPOSAL_FILES_TRAIN", "()")
    assert "DATASETS.PROPOSAL_FILES_TRAIN names 0 for the 1 sets" in message
    message = refused(FAST, files, "DATASETS.PROPOSAL_FILES_TRAIN", "('gone.pkl',)")
    assert "there is no gone.pkl; name one for each, or choose a Faster R-CNN" in message
    with_keypoints(files, ["one"])
    assert "its annotations have 2 and its categories name 1" in refused(KEYPOINT, files)
    fit_kind(small_detection_config(KEYPOINT, "DATASETS.KEYPOINTS", "['a', 'b']"))


def test_evaluators_by_kind(tmp_path: Path) -> None:
    cfg = small_detection_config(VOC)
    MetadataCatalog.get("voc_2007_test").set(evaluator_type="pascal_voc")
    made = build_evaluators(cfg, "voc_2007_test", str(tmp_path), FastCOCOEvaluator)
    assert isinstance(made, PascalVOCDetectionEvaluator)
    MetadataCatalog.get("strange").set(evaluator_type="strange")
    with pytest.raises(DataError, match="no evaluator of its type 'strange'"):
        build_evaluators(cfg, "strange", str(tmp_path), FastCOCOEvaluator)
    name = panoptic_set(tmp_path, "coco_panoptic_seg")
    cfg = small_detection_config(VOC, "DATASETS.TEST", f"('{name}',)")
    with pytest.raises(DataError, match="scored by panopticapi.*pip install panopticapi"):
        fit_kind(cfg)

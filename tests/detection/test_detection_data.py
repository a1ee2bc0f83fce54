"""Classes from the data, and data that cannot serve."""

from pathlib import Path

import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers_weights import CATEGORIES, FPN, make_coco, small_detection_config

from jigsaw_d2.detection.config import dataset_classes
from jigsaw_d2.io import DataError


def config(files: list[list[str]]) -> CfgNode:
    sets = str(tuple(entry[0] for entry in files))
    return small_detection_config(
        FPN, "DATASETS.COCO_FILES", str(files), "DATASETS.TRAIN", sets, "DATASETS.TEST", "()"
    )


def test_a_set_that_a_users_module_registered() -> None:
    DatasetCatalog.register("by_hand", lambda: [])
    MetadataCatalog.get("by_hand").thing_classes = ["x"]
    cfg = small_detection_config(FPN, "DATASETS.TRAIN", "('by_hand',)", "DATASETS.TEST", "()")
    assert dataset_classes(cfg) == ["x"]
    # COCO's are known before its files are read, which are not here
    assert len(dataset_classes(small_detection_config(FPN))) == 80


def test_errors_name_the_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'nowhere' is not registered.*COCO_FILES.*--register"):
        dataset_classes(small_detection_config(FPN, "DATASETS.TRAIN", "('nowhere',)"))
    with pytest.raises(DataError, match="DATASETS.TRAIN is empty"):
        dataset_classes(small_detection_config(FPN, "DATASETS.TRAIN", "()"))
    cfg = config(make_coco(tmp_path / "data_b"))
    assert dataset_classes(cfg) == CATEGORIES
    cfg.DATASETS.TEST = ("coco_2017_val",)
    with pytest.raises(DataError, match=r"data_b_set 3 \(cell, plate, rod\), coco_2017_val 80"):
        dataset_classes(cfg)
    (tmp_path / "broken.json").write_text("[")
    files = [["broken_set", str(tmp_path / "broken.json"), str(tmp_path)]]
    with pytest.raises(DataError, match="'broken_set' cannot be read"):
        dataset_classes(config(files))

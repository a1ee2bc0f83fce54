"""Classes from the data, and data that cannot serve."""

from pathlib import Path

import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from helpers_weights import CATEGORIES, FPN, MASK, make_coco, small_detection_config

from jigsaw_d2.detection.detection_data import check_annotations, dataset_classes
from jigsaw_d2.io import DataError as DatasetError


def config(files: list[list[str]], name: str = FPN) -> CfgNode:
    sets = str(tuple(entry[0] for entry in files))
    return small_detection_config(
        name, "DATASETS.COCO_FILES", str(files), "DATASETS.TRAIN", sets, "DATASETS.TEST", "()"
    )


def test_classes_of_a_listed_set(tmp_path: Path) -> None:
    assert dataset_classes(config(make_coco(tmp_path / "data_a"))) == CATEGORIES


def test_classes_of_a_registered_set_are_known_before_it_is_read() -> None:
    cfg = small_detection_config(FPN)  # COCO: its files are not here
    assert len(dataset_classes(cfg)) == 80


def test_a_set_that_a_users_module_registered() -> None:
    DatasetCatalog.register("by_hand", lambda: [])
    MetadataCatalog.get("by_hand").thing_classes = ["x"]
    cfg = small_detection_config(FPN, "DATASETS.TRAIN", "('by_hand',)", "DATASETS.TEST", "()")
    assert dataset_classes(cfg) == ["x"]


def test_errors_name_the_set(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="'nowhere' is not registered.*COCO_FILES"):
        dataset_classes(small_detection_config(FPN, "DATASETS.TRAIN", "('nowhere',)"))
    with pytest.raises(DatasetError, match="DATASETS.TRAIN is empty"):
        dataset_classes(small_detection_config(FPN, "DATASETS.TRAIN", "()"))
    files = make_coco(tmp_path / "data_b")
    cfg = config(files)
    cfg.DATASETS.TEST = ("coco_2017_val",)
    with pytest.raises(DatasetError, match=r"data_b_set 3 \(cell, plate, rod\), coco_2017_val 80"):
        dataset_classes(cfg)
    (tmp_path / "broken.json").write_text("[")
    files = [["broken_set", str(tmp_path / "broken.json"), str(tmp_path)]]
    with pytest.raises(DatasetError, match="'broken_set' cannot be read"):
        dataset_classes(config(files))


def test_masks_are_asked_for_where_they_are_trained(tmp_path: Path) -> None:
    boxes = make_coco(tmp_path / "data_boxes", masks=False)
    for files, name, fine in (
        (make_coco(tmp_path / "data_masks"), MASK, True),
        (boxes, FPN, True),
        (boxes, MASK, False),
    ):
        cfg = config(files, name)
        dataset_classes(cfg)
        if fine:
            check_annotations(cfg)
        else:
            with pytest.raises(DatasetError, match="no segmentation, but the config trains masks"):
                check_annotations(cfg)

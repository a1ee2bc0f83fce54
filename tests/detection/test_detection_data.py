"""Classes from the data, and data that cannot serve."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from helpers_weights import CATEGORIES, FPN, make_coco, small_detection_config

from jigsaw_d2.detection.data import check_registered, dataset_classes, prepare_data
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


def prepared(folder: Path, change: Callable[[dict], None], *overrides: str) -> CfgNode:
    """A config whose one set was changed by ``change`` before it was prepared."""
    files = make_coco(folder)
    content = json.loads(Path(files[0][1]).read_text())
    change(content)
    Path(files[0][1]).write_text(json.dumps(content))
    cfg = config(files)
    cfg.merge_from_list(["OUTPUT_DIR", str(folder / "out"), *overrides])
    prepare_data(cfg)
    return cfg


def records(cfg: CfgNode) -> list[dict]:
    return DatasetCatalog.get(cfg.DATASETS.TRAIN[0])


def test_a_good_set_is_registered_as_it_is(tmp_path: Path) -> None:
    cfg = prepared(tmp_path / "good", lambda content: None)
    assert cfg.DATASETS.COCO_FILES[0][1] == str(tmp_path / "good" / "train.json")
    assert not (tmp_path / "good" / "out").exists() and len(records(cfg)) == 4


def test_training_sees_the_cleaned_set_in_every_process(tmp_path: Path) -> None:
    def spoil(content: dict) -> None:
        content["images"][0]["file_name"] = "gone.png"
        content["images"][1]["height"] = 63
        content["annotations"][-1]["category_id"] = 99
        content["annotations"][-2] |= {"segmentation": [[2, 2, 9, 9]], "ignore": 1}
        content["annotations"][-3]["id"] = 1

    cfg = prepared(tmp_path / "spoilt", spoil)
    kept = records(cfg)
    assert [len(record["annotations"]) for record in kept] == [2, 1]
    assert kept[1]["annotations"][0]["iscrowd"] == 1
    name, json_file, images = cfg.DATASETS.COCO_FILES[0]
    assert Path(json_file).parent == tmp_path / "spoilt" / "out" / "datasets"
    prepare_data(cfg)  # of what is clean nothing is left to do
    assert cfg.DATASETS.COCO_FILES[0][1] == json_file
    cfg.DATASETS.COCO_FILES = [[name, str(tmp_path / "spoilt" / "train.json"), images]]
    cfg.OUTPUT_DIR = str(tmp_path / "other")  # of another run of this process
    prepare_data(cfg)
    assert Path(cfg.DATASETS.COCO_FILES[0][1]).read_bytes() == Path(json_file).read_bytes()
    cfg.DATASETS.COCO_FILES = [[name, json_file, "elsewhere"]]
    with pytest.raises(DataError, match=f"{name}.* cannot be read: image folder elsewhere"):
        prepare_data(cfg)


def no_objects(content: dict) -> None:
    content["annotations"] = []


def no_images(content: dict) -> None:
    for image in content["images"]:
        image["file_name"] = "gone" + image["file_name"]


def one_image_less(content: dict) -> None:
    content["images"][0]["file_name"] = "gone.png"


def other_order(content: dict) -> None:
    content["categories"][0]["id"], content["categories"][1]["id"] = 2, 1


@pytest.mark.parametrize(
    "change, message",
    [
        (no_objects, "'held_out_set' has no usable object, so nothing can be evaluated"),
        (one_image_less, "'held_out_set' has images that cannot be read.*1 x image_missing.*gone"),
        (no_images, "nothing can be evaluated.*4 x image_missing.*gone0.png"),
        (other_order, r"different classes: .*\(cell, plate, rod\), .*\(plate, cell, rod\)"),
    ],
)
def test_a_held_out_set_that_is_of_no_use_is_refused(
    tmp_path: Path, change: Callable[[dict], None], message: str
) -> None:
    cfg = prepared(tmp_path / f"for_{change.__name__}", lambda content: None)
    (held_out,) = make_coco(tmp_path / "held_out")
    content = json.loads(Path(held_out[1]).read_text())
    change(content)
    Path(held_out[1]).write_text(json.dumps(content))
    cfg.DATASETS.COCO_FILES = [*cfg.DATASETS.COCO_FILES, held_out]
    cfg.DATASETS.TEST = (held_out[0],)
    with pytest.raises(DataError, match=message):
        prepare_data(cfg)


def test_masks(tmp_path: Path) -> None:
    def run_lengths(content: dict) -> None:
        for entry in content["annotations"]:
            entry["segmentation"] = {"size": [64, 64], "counts": [100, 50, 64 * 64 - 150]}

    def some(content: dict) -> None:
        content["annotations"][0]["segmentation"] = []
        content["annotations"][1]["segmentation"] = [[1, 1, 5, 5]]

    masks = ("MODEL.MASK_ON", "True")
    assert prepared(tmp_path / "rle", run_lengths, *masks).INPUT.MASK_FORMAT == "bitmask"
    assert prepared(tmp_path / "rings", lambda c: None, *masks).INPUT.MASK_FORMAT == "polygon"
    assert len(records(prepared(tmp_path / "boxes", some))[0]["annotations"]) == 2
    with pytest.raises(DataError, match="no segmentation for 2 of 8 objects.*MASK_ON False"):
        prepared(tmp_path / "mixed", some, *masks)


def test_sets_of_modules_are_looked_at_but_not_changed(tmp_path: Path) -> None:
    ((_, json_file, images),) = make_coco(tmp_path / "by_module")
    register_coco_instances("by_module", {}, json_file, images)
    cfg = small_detection_config(FPN, "DATASETS.TRAIN", "('by_module',)", "DATASETS.TEST", "()")
    check_registered(cfg)
    (Path(images) / "2.png").unlink()
    with pytest.raises(DataError, match="'by_module', which a module .*1 x image_missing.*2.png"):
        check_registered(cfg)

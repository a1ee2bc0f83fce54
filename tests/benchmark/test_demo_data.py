import hashlib

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from benchmark.demo_data import SHAPE_CLASSES, DemoOptions, draw_demo_image, make_demo_set
from jigsaw_d2.io import ConfigError, DataError

OPTIONS = DemoOptions(seed=3, train_images=40, val_images=4)


@pytest.fixture(scope="module")
def demo_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "set"
    make_demo_set(folder, OPTIONS)
    return folder


def test_is_a_readable_coco_set_with_square_tall_and_wide_classes(demo_set):
    coco = COCO(str(demo_set / "train.json"))
    assert len(coco.getImgIds()) == 40 and len(COCO(str(demo_set / "val.json")).getImgIds()) == 4
    for record in coco.dataset["images"]:
        image = cv2.imread(str(demo_set / "images" / record["file_name"]))
        assert image.shape[:2] == (record["height"], record["width"])
    boxes = np.array([a["bbox"] for a in coco.dataset["annotations"] if not a["iscrowd"]])
    aspects = boxes[:, 2] / boxes[:, 3]
    assert (aspects < 0.5).sum() > 5 and (aspects > 1.5).sum() > 5
    assert ((aspects >= 0.5) & (aspects <= 1.5)).sum() > 5
    assert {a["category_id"] for a in coco.dataset["annotations"]} == set(range(1, 9))
    assert len(SHAPE_CLASSES) == 8


def test_boxes_lie_inside_and_bound_their_masks(demo_set):
    coco = COCO(str(demo_set / "train.json"))
    crowds = 0
    for annotation in coco.dataset["annotations"]:
        image = coco.imgs[annotation["image_id"]]
        x, y, w, h = annotation["bbox"]
        assert x >= 0 and y >= 0 and x + w <= image["width"] and y + h <= image["height"]
        if annotation["iscrowd"]:  # run lengths are exact, polygons are not
            crowds += 1
            rle = coco_mask.frPyObjects(annotation["segmentation"], image["height"], image["width"])
            assert coco_mask.toBbox(rle).tolist() == [x, y, w, h]
            assert coco_mask.area(rle) == annotation["area"]
    assert crowds >= 1


def test_objects_overlap(demo_set):
    coco = COCO(str(demo_set / "train.json"))
    overlapping = 0
    for found in coco.imgToAnns.values():
        boxes = [entry["bbox"] for entry in found if not entry["iscrowd"]]
        ious = coco_mask.iou(boxes, boxes, [0] * len(boxes))
        overlapping += int((np.triu(ious, 1) > 0.05).sum())
    assert overlapping >= 5


def test_an_image_depends_on_seed_split_and_number_alone():
    image, annotations = draw_demo_image(3, 0, 5)
    again, annotations_again = draw_demo_image(3, 0, 5)
    np.testing.assert_array_equal(image, again)
    assert annotations == annotations_again
    assert image.dtype == np.uint8 and image.shape[2] == 3
    for other in ((4, 0, 5), (3, 1, 5), (3, 0, 6)):
        assert not np.array_equal(image, draw_demo_image(*other)[0])


def test_pixels_are_those_of_every_version(demo_set):
    """The reports' figures were measured on them; drawn here once, compared by their digest."""
    image, _ = draw_demo_image(0, 0, 0)
    assert hashlib.sha256(image.tobytes()).hexdigest()[:16] == "014d3446b45a9387"


def test_second_call_keeps_the_set_and_other_options_are_refused(tmp_path):
    folder = tmp_path / "set"
    data = make_demo_set(folder, DemoOptions(train_images=2, val_images=1))
    before = (folder / "train.json").stat().st_mtime_ns
    assert make_demo_set(folder, DemoOptions(train_images=2, val_images=1)) == data
    with pytest.raises(ConfigError, match="train_images: 2 -> 3"):
        make_demo_set(folder, DemoOptions(train_images=3, val_images=1))
    assert (folder / "train.json").stat().st_mtime_ns == before
    assert not (tmp_path / "set.part").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="no demo set"):
        make_demo_set(tmp_path / "mine")

"""One reading of a set: what the detector trains on and is scored on is what extraction cuts."""

import json
from pathlib import Path

import numpy as np
import pytest
from detectron2.data.datasets import load_coco_json
from helpers_coco import annotation, make_bad_coco, write_json
from PIL import Image

from jigsaw_d2.data.cleaning import CHUNK, clean_set, describe, usable_segmentation
from jigsaw_d2.data.plan import plan_positives
from jigsaw_d2.data.report import ExtractionLog
from jigsaw_d2.data.sources import CocoSource
from jigsaw_d2.io import DataError

BOX = [10, 10, 30, 20]


def image(number: object = 1, name: str = "a.png", height: object = 60, width: object = 80) -> dict:
    return {"id": number, "file_name": name, "height": height, "width": width}


def clean(folder: Path, images: list[dict], annotations: list[dict], encoding: str = "utf-8"):
    """(the set, its json as Detectron2 would be given it) of a folder with one file, a.png."""
    (folder / "images").mkdir()
    Image.new("RGB", (80, 60)).save(folder / "images" / "a.png")
    path = write_json(folder / "set.json", images, annotations)
    path.write_bytes(path.read_text().encode(encoding))
    made = clean_set(CocoSource(path, folder / "images"))
    return made, made.to_coco()


def whole(**changes: object) -> dict:
    """An annotation that lacks nothing; None takes a key away."""
    entry = annotation(1, BOX) | {"id": 7, "area": 600.0} | changes
    return {key: value for key, value in entry.items() if value is not None}


def test_a_good_set_is_left_as_it_is(tmp_path: Path) -> None:
    made, content = clean(tmp_path, [image()], [whole(), whole(bbox=[1, 1, 5, 5], id=9)])
    assert made.is_as_it_was and (made.objects, made.class_counts()) == (2, [2, 0, 0])
    assert [(a["id"], a["area"]) for a in content["annotations"]] == [(7, 600.0), (9, 600.0)]
    assert "1 images, 2 objects of 3 classes; without any object: kind1, kind2" in describe(
        "x", made
    )


@pytest.mark.parametrize(
    "changes, reason, key, value",
    [
        ({"area": None}, "annotation_area_missing", "area", 600.0),
        ({"area": float("nan")}, "annotation_area_missing", "area", 600.0),
        ({"iscrowd": None}, "annotation_iscrowd_missing", "iscrowd", 0),
        ({"id": 0}, "annotation_id_unusable", "id", 1),
        ({"id": "ann-1"}, "annotation_id_unusable", "id", 1),
        ({"id": -1}, "annotation_id_unusable", "id", 1),
        ({"bbox": ["10", "10", "30", "20"]}, "number_is_text", "bbox", BOX),
        ({"area": "600"}, "number_is_text", "area", 600.0),
        ({"iscrowd": "0"}, "number_is_text", "iscrowd", 0),
        ({"iscrowd": "0", "bbox": ["10", 10, 30, 20]}, "number_is_text", "bbox", BOX),
        ({"category_id": "3"}, "id_of_other_kind", "category_id", 3),
        ({"image_id": "1"}, "id_of_other_kind", "image_id", 1),
        ({"segmentation": [[10, 10, 40, 30]]}, "segmentation_unusable", "segmentation", None),
        ({"segmentation": {"size": [80, 60], "counts": "1"}}, "segmentation_unusable", "bbox", BOX),
    ],
)
def test_what_is_missing_or_odd_is_mended_and_counted_once(
    tmp_path: Path, changes: dict, reason: str, key: str, value: object
) -> None:
    made, content = clean(tmp_path, [image()], [whole(**changes)])
    (entry,) = content["annotations"]
    assert entry.get(key) == value
    assert dict(made.log.counts) == {"category_ids_with_gaps": 1, reason: 1}
    assert not made.is_as_it_was


@pytest.mark.parametrize("flag", [{"ignore": 1}, {"iscrowd": 1}, {"iscrowd": "1"}])
def test_ignored_objects_and_crowds_are_crowds(tmp_path: Path, flag: dict) -> None:
    made, content = clean(tmp_path, [image()], [whole(**flag), whole(bbox=[1, 1, 5, 5], id=8)])
    assert [a["iscrowd"] for a in content["annotations"]] == [1, 0]
    assert made.objects == 1 and "ignore" not in content["annotations"][0]
    assert made.is_as_it_was == (flag == {"iscrowd": 1})  # all that Detectron2 reads rightly


@pytest.mark.parametrize(
    "sizes, reason",
    [
        ({"height": "60", "width": "80"}, "number_is_text"),
        ({"height": None}, "image_size_missing"),
        ({"height": 60.0, "width": 80.0}, None),
        ({"height": 80, "width": 60}, "image_size_differs"),
        ({"height": "tall", "width": "80"}, "image_size_differs"),
    ],
)
def test_sizes(tmp_path: Path, sizes: dict, reason: str | None) -> None:
    made, content = clean(tmp_path, [image(**sizes)], [whole()])
    found = [(i["height"], i["width"]) for i in content["images"]]
    assert found == ([] if reason == "image_size_differs" else [(60, 80)])
    assert made.log.counts[reason or "image_size_differs"] == (reason is not None)


@pytest.mark.parametrize(
    "name, mended",
    [
        ("a.png", False),
        ("images\\a.png", True),
        (".\\a.png", True),
        ("images/a.png", True),
        ("C:\\Users\\anna\\set\\a.png", True),
        ("/home/anna/set/a.png", True),
        ("other/a.png", None),
        ("images\\b.png", None),
    ],
)
def test_paths_of_other_machines(tmp_path: Path, name: str, mended: bool | None) -> None:
    made, content = clean(tmp_path, [image(name=name)], [whole()])
    log = made.log.counts
    assert (log["image_path_mended"], log["image_missing"]) == (mended is True, mended is None)
    expected = [] if mended is None else [str(tmp_path / "images" / "a.png")]
    assert [i["file_name"] for i in content["images"]] == expected


def test_a_byte_order_mark_and_text_ids(tmp_path: Path) -> None:
    text = image("2008_000008")
    made, content = clean(tmp_path, [text], [whole(image_id="2008_000008")], "utf-8-sig")
    assert made.log.counts["json_encoding"] == made.log.counts["image_id_is_text"] == 1
    number = content["images"][0]["id"]
    assert isinstance(number, int) and content["annotations"][0]["image_id"] == number


def test_two_categories_of_one_name_are_told_apart(tmp_path: Path) -> None:
    path = write_json(tmp_path / "set.json", [], [])
    content = json.loads(path.read_text())
    content["categories"] = [{"id": n, "name": t} for n, t in enumerate(("a", "a (2)", "a", 5))]
    path.write_text(json.dumps(content))
    made = clean_set(CocoSource(path, tmp_path))
    assert made.data.categories == ["a", "a (2)", "a (3)", "5"]
    assert made.log.counts["category_name_not_text"] == 1
    assert made.log.counts["category_name_repeated"] == 1


def test_extraction_and_detectron2_see_the_same_objects(tmp_path: Path) -> None:
    """Of a set with every fault there is: the images, and the boxes that make a positive."""
    source = CocoSource(*make_bad_coco(tmp_path / "bad"))
    made = clean_set(source)
    path = tmp_path / "cleaned.json"
    path.write_text(json.dumps(made.to_coco()))
    records = load_coco_json(str(path), str(source.image_root), "test_cleaning_bad")
    theirs = {
        record["file_name"]: [(*a["bbox"], a["category_id"]) for a in record["annotations"]]
        for record in records
    }
    log = ExtractionLog()
    ours = {}
    for entry in source.load(log).images:
        plan = plan_positives(entry, 0, 1.0, 0.0, log)
        if plan is not None:
            crowds = {a.box for a in entry.annotations if a.crowd}
            ours[plan.path] = (plan.gt_boxes, plan.classes)
            clipped = np.array(theirs[plan.path]).reshape(-1, 5)
            clipped[:, 2:4] += clipped[:, :2]
            clipped = np.array([row for row in clipped if tuple(row[:4]) not in crowds])
            clipped = clipped.reshape(-1, 5)
            limits = np.array([plan.size[1], plan.size[0]] * 2)
            assert np.minimum(clipped[:, :4], limits).tolist() == plan.gt_boxes.tolist()
            assert clipped[:, 4].tolist() == plan.classes.tolist()
    assert ours.keys() == theirs.keys() and len(ours) > 5
    reasons = {r for r, entry in log.to_dict().items() if entry["kind"] == "fault"}
    assert reasons == {r for r, entry in made.log.to_dict().items() if entry["kind"] == "fault"}


# What tools write for one object of one image, as they document it: image, annotation, categories.
EXPORTS = {
    "cvat": (
        {"license": 0, "flickr_url": "", "coco_url": "", "date_captured": 0},
        {"attributes": {"occluded": False}, "segmentation": []},
        [{"id": 1, "name": "a", "supercategory": ""}],
    ),
    "label_studio": (
        {"file_name": "../../label-studio/data/media/upload/1/a.png"},
        {"id": 0, "category_id": 0, "ignore": 0, "segmentation": []},
        [{"id": 0, "name": "a"}],
    ),
    "label_studio_windows": (
        {"file_name": "images\\a.png"},
        {"id": 0, "category_id": 0, "ignore": 0, "segmentation": []},
        [{"id": 0, "name": "a"}],
    ),
    "roboflow": (
        {"license": 1, "date_captured": "2024-01-01T00:00:00+00:00", "extra": {"name": "x.png"}},
        {"id": 0, "bbox": [10, 10, 30.5, 20.25], "area": 617.6, "segmentation": []},
        [{"id": 0, "name": "parts", "supercategory": "none"}, {"id": 1, "name": "a"}],
    ),
    "labelme2coco": (
        {},
        {"segmentation": [[10, 10, 40, 10, 40, 30]], "area": 300},
        [{"id": 1, "name": "a", "supercategory": "a"}],
    ),
    "fiftyone": (
        {"license": None, "coco_url": None},
        {"category_id": 0, "score": None, "area": 600.0},
        [{"id": 0, "name": "a", "supercategory": None}],
    ),
}


@pytest.mark.parametrize("tool", EXPORTS)
def test_exports_of_tools(tmp_path: Path, tool: str) -> None:
    of_image, of_annotation, categories = EXPORTS[tool]
    (tmp_path / "images").mkdir()
    Image.new("RGB", (80, 60)).save(tmp_path / "images" / "a.png")
    path = tmp_path / "result.json"
    lists = {"images": [image() | of_image], "annotations": [whole() | of_annotation]}
    path.write_text(json.dumps({"info": {}, "licenses": [], **lists, "categories": categories}))
    made = clean_set(CocoSource(path, tmp_path / "images"))
    assert made.objects == 1 and made.data.categories[-1] == "a"
    (entry,) = made.to_coco()["annotations"]
    assert entry["id"] > 0 and entry["iscrowd"] == 0 and entry["bbox"][:2] == [10, 10]


def test_strict_stops_and_many_images_are_shared_out(tmp_path: Path) -> None:
    source = CocoSource(*make_bad_coco(tmp_path / "bad"))
    with pytest.raises(DataError, match="stopped because of --strict"):
        clean_set(source, ExtractionLog(strict=True))
    (tmp_path / "few").mkdir()
    names = [image(n, f"{n}.png") for n in range(2 * CHUNK + 1)]  # three chunks: processes
    made = clean_set(CocoSource(write_json(tmp_path / "many.json", names, []), tmp_path / "few"))
    assert made.log.counts["image_missing"] == len(names) and made.objects == 0


@pytest.mark.parametrize(
    "outline, kept",
    [
        ([[0, 0, 5, 0, 5, 5]], [[0, 0, 5, 0, 5, 5]]),
        ([[0, 0, 5, 5], [0, 0, 5, 0, 5, 5]], [[0, 0, 5, 0, 5, 5]]),
        ([[0, 0, 5, 0, 5, "5"]], None),
        ([[0, 0, 5, 0, 5, float("nan")]], None),
        ({"size": [60, 80], "counts": [4800]}, {"size": [60, 80], "counts": [4800]}),
        ({"size": [60, 80]}, None),
        ([], None),
        (None, None),
        ("polygon", None),
    ],
)
def test_outlines(outline: object, kept: object) -> None:
    assert usable_segmentation(outline, (60, 80)) == kept

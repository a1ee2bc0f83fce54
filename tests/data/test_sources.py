"""Detection sets as they come: repeated, incomplete, registered."""

import json
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from helpers_coco import annotation, write_json

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.data.report import ExtractionLog
from jigsaw_d2.data.sources import (
    COCO_RULES,
    UNKNOWN_CLASS,
    CocoSource,
    RegisteredSource,
    SourceData,
    image_number,
    register_coco_files,
)
from jigsaw_d2.io import ConfigError, DataError


def entry(image_id: object, name: str) -> dict:
    return {"id": image_id, "file_name": name, "height": 50, "width": 60}


def load(
    folder: Path, images: list[dict], annotations: list[dict]
) -> tuple[SourceData, ExtractionLog]:
    log = ExtractionLog()
    source = CocoSource(write_json(folder / "set.json", images, annotations), folder)
    return source.load(log), log


def test_classes_are_numbered_in_the_order_of_their_ids(tmp_path: Path) -> None:
    images = [entry(9, "b.jpg"), entry(2, "a.jpg")]
    data, log = load(
        tmp_path, images, [annotation(9, [1, 2, 3, 4], 7), annotation(9, [0, 0, 5, 5], 3)]
    )
    assert data.categories == ["kind0", "kind1", "kind2"] and data.category_ids == [1, 3, 7]
    assert [image.image_id for image in data.images] == [2, 9]
    assert data.images[1].annotations == [((1, 2, 4, 6), 2, False), ((0, 0, 5, 5), 1, False)]
    assert data.images[1].size == (50, 60)
    assert log.counts == {"category_ids_with_gaps": 1}


def test_repetitions_are_resolved_and_counted(tmp_path: Path) -> None:
    images = [entry(1, "a.jpg"), entry(2, "a.jpg"), entry(3, "b.jpg"), entry(3, "c.jpg")]
    annotations = [
        annotation(1, [1, 1, 9, 9]),
        annotation(2, [2, 2, 9, 9]),  # joins the first entry of a.jpg
        annotation(2, [1, 1, 9, 9]),  # the same object listed under both
        {**annotation(3, [5, 5, 9, 9]), "id": 1},  # an id that stands for another object
        annotation(4, [5, 5, 9, 9]),
        annotation(1, [3, 3, 9, 9], category=99),
    ]
    data, log = load(tmp_path, images, annotations)
    assert [Path(image.path).name for image in data.images] == ["a.jpg", "b.jpg"]
    found = [(a.box[0], a.class_index) for a in data.images[0].annotations]
    assert found == [(1, 0), (2, 0), (3, UNKNOWN_CLASS)]
    assert log.counts == {
        "category_ids_with_gaps": 1,
        "image_listed_twice": 1,
        "image_id_repeated": 1,
        "annotation_repeated": 1,
        "annotation_id_repeated": 1,
        "annotation_of_unknown_image": 1,
    }


def test_category_id_for_two_names(tmp_path: Path) -> None:
    path = write_json(tmp_path / "set.json", [], [])
    content = json.loads(path.read_text())
    content["categories"].append({"id": 3, "name": "again"})
    path.write_text(json.dumps(content))
    log = ExtractionLog()
    assert CocoSource(path, tmp_path).load(log).categories == ["kind0", "kind1", "kind2"]
    assert log.counts["category_id_repeated"] == 1
    with pytest.raises(DataError, match="category 3 'again'.*--strict"):
        CocoSource(path, tmp_path).load(ExtractionLog(strict=True))


def test_boxes_that_are_not_four_numbers_become_nan(tmp_path: Path) -> None:
    boxes = [[1, 2, 3], None, ["x", 1, 2, 3], [float("nan"), 0, 1, 1]]
    data, _ = load(tmp_path, [entry(1, "a.jpg")], [annotation(1, box) for box in boxes])
    # The four are alike in nothing but being unusable, so none is a repetition of another.
    assert [np.isnan(a.box).any() for a in data.images[0].annotations] == [True] * 4


def test_missing_files_are_named(tmp_path: Path) -> None:
    path = write_json(tmp_path / "set.json", [], [])
    for json_file, folder, message in (
        (tmp_path / "none.json", tmp_path, "none.json cannot be read"),
        (path, tmp_path / "nowhere", "image folder .*nowhere does not exist"),
    ):
        with pytest.raises(DataError, match=message):
            CocoSource(json_file, folder).load(ExtractionLog())


def test_image_numbers_are_stable() -> None:
    assert image_number(17) == 17 and image_number("17") == 17 and image_number(-3) == -3
    # Text that is no plain number: a hash, so that "000017" and 17 stay two images.
    assert image_number("000017") not in (17, image_number("17a"))
    assert 0 <= image_number("2008_000008") == image_number("2008_000008") < 2**63


def test_registered_coco_equals_the_file(tiny_coco: Path) -> None:
    name = "test_extraction_sources_coco"
    register_coco_instances(name, {}, str(tiny_coco / "train.json"), str(tiny_coco / "images"))
    try:
        registered = RegisteredSource(name).load(ExtractionLog())
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    direct = CocoSource(tiny_coco / "train.json", tiny_coco / "images").load(ExtractionLog())
    assert registered == direct
    assert registered.content_hash() == direct.content_hash()


@pytest.fixture
def registered() -> str:
    """A dataset in Detectron2's standard dicts, with text ids and without sizes."""
    name = "test_extraction_sources_dicts"
    box = {"bbox": [10, 20, 30, 40], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1}
    dicts = [
        {
            "file_name": "a.jpg",
            "image_id": "img_b",
            "annotations": [box, {**box, "category_id": 2}],
        },
        {"file_name": "b.jpg", "image_id": "img_a"},
    ]
    DatasetCatalog.register(name, lambda: dicts)
    MetadataCatalog.get(name).set(thing_classes=["one", "two"])
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_registered_dicts(registered: str) -> None:
    data = RegisteredSource(registered).load(ExtractionLog())
    assert data.categories == ["one", "two"] and data.category_ids == [0, 1]
    by_name = {image.path: image for image in data.images}
    found = [((10, 20, 40, 60), label, False) for label in (1, UNKNOWN_CLASS)]
    assert by_name["a.jpg"].annotations == found
    assert by_name["a.jpg"].size is None and by_name["b.jpg"].annotations == []


def test_unknown_and_incomplete_registered_datasets() -> None:
    with pytest.raises(DataError, match="no dataset 'no_such_set' is registered"):
        RegisteredSource("no_such_set").load(ExtractionLog())
    name = "test_extraction_sources_broken"
    DatasetCatalog.register(name, lambda: [{"file_name": "a", "annotations": [{"bbox": [0] * 4}]}])
    try:
        with pytest.raises(DataError, match="names no classes: set its thing_classes"):
            RegisteredSource(name).load(ExtractionLog())
        MetadataCatalog.get(name).set(thing_classes=["one"])
        with pytest.raises(DataError, match='dict 0 lacks "bbox_mode"'):
            RegisteredSource(name).load(ExtractionLog())
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


IMAGE = {"id": 1, "file_name": "a.jpg", "height": 5, "width": 6}
ANNOTATION = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 2, 2]}
CATEGORY = {"id": 1, "name": "a"}
GOOD = {"images": [IMAGE], "annotations": [ANNOTATION], "categories": [CATEGORY]}


@pytest.mark.parametrize(
    "key, broken, message",
    [
        (name, {k: v for k, v in GOOD[name][0].items() if k != key}, f'entry 1 lacks "{key}"')
        for name, keys in COCO_RULES.items()
        for key in keys
    ]
    + [
        (name, {**GOOD[name][0], key: value}, f'entry 1: its "{key}" cannot be ')
        for name, key, value in [
            ("images", "file_name", None),
            ("images", "id", [1]),
            ("annotations", "image_id", {}),
            ("annotations", "category_id", [2]),
            ("categories", "id", "1"),
        ]
    ]
    + [("images", entry, "entry 1 is .*, no object") for entry in (1, None, "a.jpg")],
)
def test_entries_of_no_use_are_named(
    tmp_path: Path, key: str, broken: object, message: str
) -> None:
    (tmp_path / "set.json").write_text(json.dumps({**GOOD, key: [GOOD[key][0], broken]}))
    with pytest.raises(DataError, match=f'set.json: "{key}" {message}'):
        CocoSource(tmp_path / "set.json", tmp_path).load(ExtractionLog())


@pytest.mark.parametrize(
    "content, message",
    [
        ("{no json", "set.json is no json"),
        ("[]", 'has no list "images"'),
        (json.dumps({**GOOD, "annotations": None}), 'has no list "annotations"'),
        (json.dumps({**GOOD, "categories": []}), '"categories" is empty'),
    ],
)
def test_a_json_without_its_lists(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "set.json").write_text(content)
    with pytest.raises(DataError, match=message):
        CocoSource(tmp_path / "set.json", tmp_path).load(ExtractionLog())


@pytest.fixture
def coco_files(tmp_path, request):
    """A one-image COCO set under a name of this test's own; forgotten afterwards."""
    name = f"set_of_{request.node.name}"
    (tmp_path / "images").mkdir()
    write_json(tmp_path / "a.json", [entry(1, "a.jpg")], [annotation(1, [1, 2, 3, 4], 7)])
    yield [name, str(tmp_path / "a.json"), str(tmp_path / "images")]
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def _cfg(*entries):
    cfg = get_jigsaw_cfg()
    cfg.DATASETS.COCO_FILES = list(entries)
    return cfg


def test_registers_once_and_again_without_harm(coco_files):
    assert register_coco_files(_cfg(coco_files)) == [coco_files[0]]
    assert register_coco_files(_cfg(coco_files)) == [coco_files[0]]
    (record,) = DatasetCatalog.get(coco_files[0])
    assert record["annotations"][0]["bbox"] == [1, 2, 3, 4]
    assert MetadataCatalog.get(coco_files[0]).thing_classes == ["kind0", "kind1", "kind2"]


def test_a_name_cannot_stand_for_two_sets(coco_files, tmp_path):
    register_coco_files(_cfg(coco_files))
    (tmp_path / "b.json").write_text((tmp_path / "a.json").read_text())
    other = [coco_files[0], str(tmp_path / "b.json"), coco_files[2]]
    with pytest.raises(ConfigError, match="already stands for .*a.json"):
        register_coco_files(_cfg(other))


@pytest.mark.parametrize("missing", [1, 2])
def test_missing_paths_and_other_forms_are_named(coco_files, missing):
    coco_files[missing] += ".gone"
    with pytest.raises(DataError, match=r"\.gone does not exist"):
        register_coco_files(_cfg(coco_files))
    with pytest.raises(ConfigError, match="each entry is"):
        register_coco_files(_cfg(["only_a_name"]))

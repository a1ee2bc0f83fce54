"""datasets.py: COCO-format sets registered from the configuration."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.data.sources import DatasetError, register_coco_files


@pytest.fixture
def coco_files(tmp_path, request):
    """A one-image COCO set under a name of this test's own; forgotten afterwards."""
    name = f"set_of_{request.node.name}"
    (tmp_path / "images").mkdir()
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 10, "width": 20}],
        "annotations": [
            {
                "id": 1,
                "image_id": 1,
                "category_id": 7,
                "bbox": [1, 2, 3, 4],
                "area": 12,
                "iscrowd": 0,
            }
        ],
        "categories": [{"id": 7, "name": "bolt"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
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
    assert MetadataCatalog.get(coco_files[0]).thing_classes == ["bolt"]


def test_a_name_cannot_stand_for_two_sets(coco_files, tmp_path):
    register_coco_files(_cfg(coco_files))
    (tmp_path / "b.json").write_text((tmp_path / "a.json").read_text())
    other = [coco_files[0], str(tmp_path / "b.json"), coco_files[2]]
    with pytest.raises(DatasetError, match="already stands for .*a.json"):
        register_coco_files(_cfg(other))


@pytest.mark.parametrize("missing", [1, 2])
def test_missing_paths_are_named(coco_files, missing):
    coco_files[missing] += ".gone"
    with pytest.raises(DatasetError, match=r"\.gone does not exist"):
        register_coco_files(_cfg(coco_files))


def test_entry_of_another_form_is_refused():
    with pytest.raises(DatasetError, match="each entry is"):
        register_coco_files(_cfg(["only_a_name"]))

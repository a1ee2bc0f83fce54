"""COCO files read as the standard library reads them, whichever parser took them."""

import json
from pathlib import Path

import msgspec
import pytest

from jigsaw_d2.extraction import coco_json
from jigsaw_d2.data.sources import CocoJson, read_coco_json
from jigsaw_d2.data.report import ExtractionError

# Values that msgspec refuses ...
ODD = ["[NaN, Infinity, -Infinity, 1e999]", '"\\ud800"']
# ... and that it reads itself.
USUAL = [
    "18446744073709551616",  # 2**64
    "-9223372036854775809",  # -2**63 - 1
    "[123456789012345678901234567890]",
    '{"a": 1, "a": 2, "b": [0.1, -0.0, 1E5, 1e-400, null, true]}',
    "[18446744073709551615, -9223372036854775808]",
    "[0.12345678901234567890123, 5e-324, 1.7976931348623157e308]",
    ' "\\u00e4 \u00e4" ',
]
TEMPLATE = """{
    "info": {"year": 2026}, "images": [{"id": %(id)s, "file_name": "a.jpg", "height": %(value)s,
    "width": %(value)s, "licence": 1}], "categories": [{"name": "a", "id": 3}], "annotations": [
    {"image_id": %(id)s, "category_id": 3, "bbox": %(value)s, "segmentation": [[%(value)s]]},
    {"id": %(id)s, "image_id": 1, "category_id": null, "bbox": %(value)s, "iscrowd": %(value)s}]}"""


def write(folder: Path, content: dict | str | bytes) -> Path:
    content = json.dumps(content) if isinstance(content, dict) else content
    content = content.encode() if isinstance(content, str) else content
    (folder / "set.json").write_bytes(content)
    return folder / "set.json"


def named_keys(content: dict) -> dict:
    """What ``CocoJson`` keeps of it, with the defaults filled in."""
    defaults = {"images": {}, "categories": {}, "annotations": {"iscrowd": 0, "id": None}}
    return {
        key: [
            {
                **default,
                **{k: v for k, v in entry.items() if k in coco_json.KINDS[key].__annotations__},
            }
            for entry in content[key]
        ]
        for key, default in defaults.items()
    }


def as_dicts(content: CocoJson) -> dict:
    return {
        key: [msgspec.structs.asdict(entry) for entry in getattr(content, key)]
        for key in coco_json.KINDS
    }


def ordered(content: dict) -> str:
    """Tells -0.0 from 0, integers from floats, and makes NaN equal to itself."""
    return repr({k: [sorted(entry.items()) for entry in v] for k, v in sorted(content.items())})


@pytest.mark.parametrize("value", ODD + USUAL)
@pytest.mark.parametrize("number", ["7", "123456789012345678901234567890", '"7"', "0.5"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_values_and_types_are_those_of_the_standard_library(
    value: str, number: str, encoding: str, tmp_path: Path
) -> None:
    text = TEMPLATE % {"id": number, "value": value}
    read = read_coco_json(write(tmp_path, text.encode(encoding)))
    assert ordered(as_dicts(read)) == ordered(named_keys(json.loads(text)))


@pytest.mark.parametrize("text", [b"", b"[1,]", b"{", b"[01]", b"\xff\xfe\xff", b"[1] 2"])
def test_faults_are_worded_by_the_standard_library(text: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as expected:
        json.loads(text)
    with pytest.raises(ExtractionError) as raised:
        read_coco_json(write(tmp_path, text))
    assert str(raised.value) == f"{tmp_path}/set.json is no json: {expected.value}"


def test_usual_files_take_the_fast_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coco_json, "_read_carefully", lambda path, text: "slow")
    for value in USUAL:
        path = write(tmp_path, TEMPLATE % {"id": "1", "value": value})
        assert isinstance(read_coco_json(path), CocoJson)
    for value in ODD:
        path = write(tmp_path, TEMPLATE % {"id": "1", "value": value})
        assert read_coco_json(path) == "slow"


IMAGE = {"id": 1, "file_name": "a.jpg", "height": 5, "width": 6}
ANNOTATION = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 2, 2]}
CATEGORY = {"id": 1, "name": "a"}
USELESS = [
    ("images", {**IMAGE, "file_name": None}, "file_name"),
    ("images", {**IMAGE, "id": [1]}, "id"),
    ("annotations", {**ANNOTATION, "image_id": {}}, "image_id"),
    ("annotations", {**ANNOTATION, "category_id": [2]}, "category_id"),
    ("categories", {**CATEGORY, "id": "1"}, "id"),
    ("categories", {**CATEGORY, "id": None}, "id"),
]


@pytest.mark.parametrize("key, entry, field", USELESS)
def test_a_value_of_no_use_is_named(key: str, entry: dict, field: str, tmp_path: Path) -> None:
    content = {"images": [IMAGE], "annotations": [ANNOTATION], "categories": [CATEGORY]}
    content[key] = [content[key][0], entry]
    with pytest.raises(ExtractionError) as raised:
        read_coco_json(write(tmp_path, content))
    assert f'set.json: "{key}" entry 1: Expected' in str(raised.value)
    assert f"`$.{field}`" in str(raised.value)


@pytest.mark.parametrize("entry", [1, None, [], "a.jpg"])
def test_an_entry_that_is_no_object(entry: object, tmp_path: Path) -> None:
    path = write(tmp_path, {"images": [entry], "annotations": [], "categories": []})
    with pytest.raises(ExtractionError, match='set.json: "images" entry 0: Expected `object`'):
        read_coco_json(path)

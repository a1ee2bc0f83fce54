"""``python -m jigsaw_d2 check``: what would be used of a set, in words and in the exit status."""

import json
from pathlib import Path

import pytest
from helpers_coco import make_bad_coco, make_coco

from jigsaw_d2.tools import run_command
from jigsaw_d2.tools.check import main


def check(data: Path, *more: str, name: str = "train") -> int:
    files = ["--json", str(data / f"{name}.json"), "--images", str(data / "images")]
    return run_command(main, [*files, *more])


def test_a_good_set_is_said_to_be_good_and_left_alone(tmp_path, capsys) -> None:
    data = make_coco(tmp_path / "set", images=3)
    content = json.loads((data / "train.json").read_text())
    for entry in content["annotations"]:
        entry.setdefault("area", 100.0)
    (data / "train.json").write_text(json.dumps(content))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert check(data) == 0
    said = capsys.readouterr().out
    assert "train.json: 3 images, 8 objects of 3 classes" in said and "is read as it is" in said
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_reader_of_arrays_needs_their_channels(tmp_path, capsys) -> None:
    assert check(make_coco(tmp_path / "set", images=1), "--reader", "module:function") == 2
    assert "channels" in capsys.readouterr().err


def test_faults_are_counted_or_with_strict_end_it(tmp_path, capsys) -> None:
    make_bad_coco(tmp_path)
    assert check(tmp_path, name="bad") == 0
    said = capsys.readouterr().out
    for words in ("image_missing", "box_outside_image", "annotation_area_missing", "is cleaned as"):
        assert words in said
    assert check(tmp_path, "--strict", name="bad") == 2


@pytest.mark.parametrize(
    "key, message", [("annotations", "nothing can be"), ("categories", "diff")]
)
def test_a_held_out_set_of_no_use_is_refused(tmp_path, capsys, key, message) -> None:
    data = make_coco(tmp_path / "set", images=3)
    (data / "kept.json").write_text((data / "train.json").read_text())
    content = json.loads((data / "kept.json").read_text())
    content[key] = [] if key == "annotations" else content[key][:2]
    (data / "kept.json").write_text(json.dumps(content))
    assert check(data, "--val-json", str(data / "kept.json")) == 2
    assert message in capsys.readouterr().err


def test_no_set_is_a_mistake(capsys) -> None:
    assert run_command(main, []) == 2 and "name the data" in capsys.readouterr().err

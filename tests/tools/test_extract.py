"""``extract_samples.py`` as a user calls it."""

import json
from pathlib import Path

import pytest

from jigsaw_d2.cost import read_cost_log
from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.tools import run_command
from jigsaw_d2.tools.extract import build_parser, main, part, size

REGISTERING = """
from detectron2.data.datasets import register_coco_instances
register_coco_instances("test_commands_extract", {{}}, "{0}/train.json", "{0}/images")
"""


def arguments(data: Path, output: Path, *more: str) -> list[str]:
    files = ["--json", str(data / "train.json"), "--images", str(data / "images")]
    return [*files, "--output", str(output), "--workers", "0", *more]


def test_both_stores_report_figure_and_ledger(tiny_coco, tmp_path, capsys) -> None:
    more = ("--val-json", str(tiny_coco / "val.json"), "--seed", "3", "--quality", "80")
    assert main(arguments(tiny_coco, tmp_path / "out" / "store", *more)) == 0
    printed = capsys.readouterr().out
    train, val = (SampleStore(tmp_path / "out" / name) for name in ("store", "store-val"))
    assert f"{len(train)} samples: 44 positive, 4 negative" in printed
    assert f"{len(val)} samples: 12 positive, 1 negative" in printed
    assert train.header["options"]["quality"] == 80 and val.header["seed"] == 3
    for store, images in ((train, 12), (val, 4)):
        stage = read_cost_log(store.paths[0])["stages"]["extraction"]
        assert (store.paths[0] / "report.png").read_bytes().startswith(b"\x89PNG")
        # An image without objects is read only if a negative fell on it.
        assert images - 1 <= stage["images"] <= images
        assert stage["pixels"] == stage["images"] * 180 * 240 and stage["seconds"] > 0


def test_registered_dataset_by_its_name(tiny_coco, tmp_path, monkeypatch) -> None:
    from detectron2.data import DatasetCatalog, MetadataCatalog

    (tmp_path / "my_datasets.py").write_text(REGISTERING.format(tiny_coco))
    monkeypatch.syspath_prepend(str(tmp_path))
    more = ["--output", str(tmp_path / "store"), "--workers", "0", "--register", "my_datasets"]
    try:
        assert main(["--dataset", "test_commands_extract", *more]) == 0
    finally:
        DatasetCatalog.remove("test_commands_extract")
        MetadataCatalog.remove("test_commands_extract")
    store = SampleStore(tmp_path / "store")
    assert store.header["source"] == "test_commands_extract" and len(store) == 48


@pytest.mark.parametrize(
    "more, words",
    [
        ([], "name the data"),
        (["--json", "a.json"], "--json also needs --images"),
        (["--dataset", "a", "--val-images", "b"], "needs --images, the folder of its images, and"),
        (["--json", "a.json", "--images", "b", "--dataset", "c"], "not both"),
        (["--dataset", "no_such_dataset"], "no dataset 'no_such_dataset' is registered"),
        (["--json", "none.json", "--images", "b"], "none.json cannot be read"),
        (["--dataset", "x", "--register", "no_such_module"], "no_such_module cannot be imported"),
    ],
)
def test_mistakes_are_one_line_and_status_2(tmp_path, more: list[str], words, capsys) -> None:
    assert run_command(main, ["--output", str(tmp_path / "s"), "--workers", "0", *more]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ")


def test_existing_store_and_overwrite(tiny_coco, tmp_path, capsys) -> None:
    assert main(arguments(tiny_coco, tmp_path / "s")) == 0
    assert run_command(main, arguments(tiny_coco, tmp_path / "s")) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert main(arguments(tiny_coco, tmp_path / "s", "--overwrite", "--enlarge", "1")) == 0
    header = json.loads((tmp_path / "s" / "header.json").read_text())
    assert header["options"]["max_scale"] == 1


def test_each_store_keeps_its_own_cost_unless_told_otherwise(tmp_path, tiny_coco) -> None:
    for name in ("one", "other"):
        assert main(arguments(tiny_coco, tmp_path / "stores" / name)) == 0
    for text in ("1/2", "2/2"):
        assert main(arguments(tiny_coco, tmp_path / "stores" / "parts", "--part", text)) == 0
    images = {
        read_cost_log(tmp_path / "stores" / name)["stages"]["extraction"]["images"]
        for name in ("one", "other", "parts")
    }
    assert len(images) == 1 and images <= {11, 12}
    assert len(SampleStore(tmp_path / "stores" / "parts")) == 48
    cost = ("--cost-dir", str(tmp_path / "cost"))
    assert main(arguments(tiny_coco, tmp_path / "stores" / "last", *cost)) == 0
    assert list(read_cost_log(tmp_path / "cost")["stages"]) == ["extraction"]
    assert not (tmp_path / "stores" / "cost.json").exists()


def test_held_out_categories_must_be_the_training_sets(tmp_path, tiny_coco, capsys) -> None:
    content = json.loads((tiny_coco / "val.json").read_text())
    content["categories"][0]["name"] = "other"
    (tmp_path / "val.json").write_text(json.dumps(content))
    more = ("--val-json", str(tmp_path / "val.json"))
    assert run_command(main, arguments(tiny_coco, tmp_path / "s", *more)) == 2
    assert "other categories than the training set" in capsys.readouterr().err


def test_sizes_and_parts_are_parsed() -> None:
    assert size("2K") == 2048 and size("1.5M") == 1572864 and size("7") == 7
    assert part("2/4") == (2, 4)
    for wrong in ("--part=x", "--part=2", "--shard-size=big"):
        with pytest.raises(SystemExit):
            build_parser().parse_args(["--output", "s", wrong])

"""Numbers of the report, derived by hand, and the sentences that follow from them."""

import re
from pathlib import Path

import numpy as np
import pytest

from jigsaw_d2.data.report import (
    FAULT,
    REASONS,
    RULE,
    ExtractionLog,
    format_report,
    summarise,
)
from jigsaw_d2.data.store_format import RECORD
from jigsaw_d2.data.template import JigsawTemplate
from jigsaw_d2.io import DataError

TEMPLATE = JigsawTemplate()


def make_index(rows: list[tuple[int, int, int, int]]) -> np.ndarray:
    """Records of (count, class, width, height)."""
    index = np.zeros(sum(row[0] for row in rows), RECORD)
    n = 0
    for count, label, width, height in rows:
        index["class"][n : n + count] = label
        index["size"][n : n + count] = (height, width)
        index["group"][n : n + count] = (
            1 if 2 * width < height else 2 if 2 * width > 3 * height else 0
        )
        index["length"][n : n + count] = 10
        n += count
    return index


def summary(rows: list[tuple[int, int, int, int]], scale: tuple = (1.0, 1.0)) -> dict:
    return summarise(make_index(rows), ["cat", "dog"], TEMPLATE, scale)


def test_counts_and_sizes() -> None:
    report = summary([(10, 0, 20, 20), (5, 1, 10, 40), (3, 0, 40, 10), (2, 2, 30, 30)])
    assert (report["samples"], report["positives"], report["negatives"]) == (20, 18, 2)
    assert report["encoded_bytes"] == {"jpg": 200}
    assert {g: (v["positive"], v["negative"]) for g, v in report["groups"].items()} == {
        "S": (10, 2),
        "T": (5, 0),
        "W": (3, 0),
    }
    assert report["classes"] == [["cat", 10, 0, 3], ["dog", 0, 5, 0], ["background", 2, 0, 0]]
    assert report["groups"]["T"]["size_percentiles"] == {"height": [40] * 3, "width": [10] * 3}


def test_suitable_data_need_no_caution() -> None:
    sizes = ((20, 64, 64), (20, 160, 160), (20, 60, 140))
    rows = [(n, label, w, h) for label in (0, 1) for n, w, h in sizes]
    assert summary([*rows, (20, 0, 140, 60), (20, 1, 140, 60)])["cautions"] == []


@pytest.mark.parametrize(
    "rows, words",
    [
        ([(50, 0, 90, 90), (50, 1, 60, 140)], "No wide (W) sample: R2 will borrow"),
        ([(50, 0, 60, 140), (50, 1, 140, 60)], "No square-like (S) sample: R1 and R4 will borrow"),
        # One T is shown once an image, one of 100 S twice: 1 to 2 / 100, 50 times as often.
        (
            [(100, 0, 90, 90), (1, 0, 60, 140), (50, 1, 140, 60)],
            "Only 1 tall (T) samples: each will be shown 50 times as often",
        ),
        ([(50, 0, 20, 20), (50, 1, 60, 140), (50, 1, 140, 60)], "R4 will be 98% zero padding"),
        (
            [(50, 0, 400, 400), (50, 1, 60, 140), (50, 1, 140, 60)],
            "R4 will show random crops: on average 84%",
        ),
        ([(3, 0, 90, 90), (50, 1, 60, 140), (50, 1, 140, 60)], "1 of 2 classes have fewer than 10"),
        ([(30, 0, 90, 90), (50, 0, 60, 140), (50, 0, 140, 60)], "1 classes have no sample (dog)"),
    ],
)
def test_cautions_name_the_trouble(rows: list, words: str) -> None:
    assert any(words in sentence for sentence in summary(rows)["cautions"])


def test_text_holds_all_of_it() -> None:
    report, log = summary([(10, 0, 20, 20), (1, 2, 30, 30)]), ExtractionLog()
    log.add("crowd", "image 7")
    log.add("image_grey", "image 8")
    text = format_report({**report, "log": {"dataset": log.to_dict(), "part": {}}})
    words = ("11 samples: 10 positive, 1 negative", "borrows", "crowd", "image 8", "! No tall")
    assert all(word in text for word in words)
    assert format_report(summary([])).startswith("0 samples")


def test_many_classes_are_shortened() -> None:
    names = [f"class{n}" for n in range(300)]
    index = make_index([(n + 1, n, 30, 30) for n in range(300)])
    text = format_report(summarise(index, names, TEMPLATE, (0.8, 1.5)), max_classes=50)
    assert "class299" in text and "\nclass3 " not in text and "251 smaller classes" in text


def test_counts_and_first_examples() -> None:
    log, other = ExtractionLog(), ExtractionLog()
    for n in range(4):
        other.add("crowd", f"other {n}")
    log.add("crowd", "image")
    log.merge(other.to_dict())
    entry = log.to_dict()["crowd"]
    assert (entry["count"], entry["kind"]) == (5, RULE)
    assert entry["examples"] == ["image", "other 0", "other 1"]


@pytest.mark.parametrize("reason", REASONS)
def test_strict_stops_at_faults_alone(reason: str) -> None:
    log = ExtractionLog(strict=True)
    if REASONS[reason][0] == FAULT:
        with pytest.raises(DataError, match=f"here: .*{reason}.*--strict"):
            log.add(reason, "here")
    else:
        log.add(reason, "here")
        assert log.counts[reason] == 1


def test_every_rule_is_in_the_table_of_the_readme() -> None:
    readme = Path(__file__).parents[2] / "projects" / "JigsawPretrain" / "README.md"
    table = readme.read_text().split("### What is read, mended and skipped")[1].split("### ")[0]
    assert set(re.findall(r"`([a-z0-9]+_[a-z0-9_]+|crowd)`", table)) == set(REASONS)

"""What the options decide: which are refused, how samples are encoded."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers_coco import annotation, write_json

from jigsaw_d2.extraction import options as options_module
from jigsaw_d2.data.extraction import CocoSource, ExtractionOptions, extract_samples
from jigsaw_d2.data.report import ExtractionError
from jigsaw_d2.data.extraction import needs_windows, shown_sizes
from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.data.template import JigsawTemplate

ALONE = ExtractionOptions(workers=0, encoding="jpeg")


@pytest.mark.parametrize(
    "field, value",
    [
        ("max_scale", 0.9),
        ("negative_ratio", -1),
        ("quality", 0),
        ("seed", -1),
        ("part", (3, 2)),
        ("workers", -2),
        ("shard_size", 0),
        ("scale_range", (1.5, 0.8)),
    ],
)
def test_impossible_options_are_named(field: str, value: object) -> None:
    with pytest.raises(ExtractionError, match=f"{field} is .*must be"):
        ExtractionOptions(**{field: value})


def test_windows_are_for_samples_larger_than_some_region_shows() -> None:
    shown = shown_sizes(JigsawTemplate(), 0.8)
    # Regions 64x64 and 160x160 (S), 160 high x 64 wide (T), 64 high x 160 wide (W), over 0.8.
    assert shown.tolist() == [[80, 80], [200, 80], [80, 200]]
    sizes = [(80, 80), (81, 70), (200, 80), (200, 90), (81, 200), (80, 200)]  # (height, width)
    boxes = np.array([[10, 20, 10 + w, 20 + h] for h, w in sizes], np.float32)
    assert needs_windows(boxes, shown).tolist() == [False, True, False, True, True, False]


def test_large_samples_are_written_for_window_decoding(tmp_path: Path) -> None:
    image = cv2.resize(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8), (600, 400))
    cv2.imwrite(str(tmp_path / "a.jpg"), image)
    entry = {"id": 1, "file_name": "a.jpg", "height": 400, "width": 600}
    boxes = [[0, 0, 300, 300], [400, 0, 50, 50]]
    write_json(tmp_path / "set.json", [entry], [annotation(1, box) for box in boxes])
    extract_samples(CocoSource(tmp_path / "set.json", tmp_path), tmp_path / "s", ALONE)
    store = SampleStore(tmp_path / "s")
    intervals = store.parts[0].index["interval"]
    assert intervals[0] > 0 and intervals[1] == 0
    assert store.decode(0).shape[:2] == tuple(store.sizes[0])
    assert np.array_equal(store.decode(0, (30, 40, 130, 110)), store.decode(0)[40:110, 30:130])


@pytest.mark.parametrize("encoding", ["png", "ppm"])
def test_quality_is_refused_where_there_are_no_jpegs(encoding: str) -> None:
    with pytest.raises(ExtractionError, match=f"quality is 90.*encoding is {encoding}"):
        ExtractionOptions(encoding=encoding, quality=90)


def boxes_of(*sizes: tuple[int, int]) -> np.ndarray:
    """XYXY (n, 4) of (width, height)."""
    return np.array([[3, 5, 3 + w, 5 + h] for w, h in sizes], np.float32).reshape(-1, 4)


@pytest.mark.parametrize(
    "given, limit, encoding, quality",
    [
        # 3 bytes a pixel: 3 x (10 x 20 + 30 x 5 + 7 x 2) = 1092.
        ({}, 1092, "ppm", None),
        ({}, 1091, "jpeg", 95),
        ({"quality": 80}, 1092, "jpeg", 80),
        ({"encoding": "jpeg"}, 1092, "jpeg", 95),
        ({"encoding": "png"}, 1, "png", None),
        ({"encoding": "ppm"}, 1, "ppm", None),
    ],
)
def test_small_sets_are_left_uncompressed(
    monkeypatch: pytest.MonkeyPatch, given: dict, limit: int, encoding: str, quality: int | None
) -> None:
    monkeypatch.setattr(options_module, "UNCOMPRESSED_UP_TO", limit)
    boxes = [boxes_of((10, 20), (30, 5)), boxes_of(), boxes_of((7, 2))]
    settled = ExtractionOptions(**given).settle_encoding(boxes)
    assert (settled.encoding, settled.quality) == (encoding, quality)


def test_every_part_takes_the_encoding_of_the_whole(
    tiny_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = CocoSource(tiny_coco / "train.json", tiny_coco / "images")
    extract_samples(source, tmp_path / "whole", ExtractionOptions(workers=0))
    whole = SampleStore(tmp_path / "whole")
    assert whole.header["options"]["encoding"] == "ppm"
    assert set(whole.header["report"]["encoded_bytes"]) == {"ppm"}
    # Too much for the whole by one byte, though not for a half.
    limit = 3 * int(whole.sizes.prod(axis=1).sum()) - 1
    monkeypatch.setattr(options_module, "UNCOMPRESSED_UP_TO", limit)
    for number in (1, 2):
        extract_samples(source, tmp_path / "s", ExtractionOptions(workers=0, part=(number, 2)))
    for part in SampleStore(tmp_path / "s").parts:
        assert part.header["options"]["encoding"] == "jpeg"
        assert set(part.header["report"]["encoded_bytes"]) == {"jpg"}

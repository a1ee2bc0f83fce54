"""From a detection set to a store: determinism, restart, parts, bad input."""

import dataclasses
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from detectron2.data.detection_utils import read_image
from helpers_coco import CATEGORY_IDS, annotation, make_bad_coco, write_json
from PIL import Image

from jigsaw_d2.data import extraction, image_reading
from jigsaw_d2.data.extraction import (
    ExtractionOptions,
    extract_samples,
)
from jigsaw_d2.data.plan import ImagePlan
from jigsaw_d2.data.samples import overlaps_any
from jigsaw_d2.data.sources import CocoSource
from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.io import ConfigError, DataError

TESTS = [str(folder) for folder in Path(__file__).parents[:2]]
ALONE = ExtractionOptions(workers=0, encoding="jpeg")


def source(folder: Path, split: str = "train") -> CocoSource:
    return CocoSource(folder / f"{split}.json", folder / "images")


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def extract(folder: Path, path: Path, **options: object) -> SampleStore:
    """The store of a set, written in this process as JPEGs unless told otherwise."""
    extract_samples(source(folder), path, dataclasses.replace(ALONE, **options))
    return SampleStore(path)


@pytest.fixture(scope="module")
def store(tiny_coco: Path, tmp_path_factory: pytest.TempPathFactory) -> SampleStore:
    return extract(tiny_coco, tmp_path_factory.mktemp("extraction") / "store")


@pytest.mark.parametrize("encoding", ["png", "ppm"])
def test_samples_are_the_pixels_of_their_boxes(tiny_coco, tmp_path, encoding) -> None:
    """Both keep every pixel, so a sample equals the box cut from what Detectron2 reads."""
    store = extract(tiny_coco, tmp_path / "s", encoding=encoding)
    files = {10 * n + 5: f"train_{n:03d}.jpg" for n in range(12)}
    for i in range(len(store)):
        image = read_image(str(tiny_coco / "images" / files[store.image_ids[i]]), "RGB")
        x0, y0, x1, y1 = store.boxes[i].astype(int)
        assert np.array_equal(store.decode(i), image[y0:y1, x0:x1])


def test_counts_ratio_and_boxes(tiny_coco: Path, store: SampleStore) -> None:
    """11 images with 4 objects, one without; a crowd on the first."""
    positive = store.classes < 3
    assert positive.sum() == 44 and (~positive).sum() == 4  # round(44 / 10)
    gt, cut = store.gt_boxes, store.boxes
    assert (cut[:, :2] <= gt[:, :2]).all() and (cut[:, 2:] >= gt[:, 2:]).all()
    sides, limits = cut[:, 2:] - cut[:, :2], 2 * (gt[:, 2:] - gt[:, :2])
    assert (sides <= limits).all()
    crowd = np.float32([[100, 10, 190, 70]])
    for i in np.flatnonzero(~positive):
        others = (store.image_ids == store.image_ids[i]) & positive
        forbidden = np.concatenate([cut[others], gt[others]])
        if store.image_ids[i] == 5:
            forbidden = np.concatenate([forbidden, crowd])
        assert not overlaps_any(cut[i : i + 1], forbidden).any()
    header = store.header
    assert header["source"] == "train" and header["category_ids"] == list(CATEGORY_IDS)
    assert header["options"]["negative_ratio"] == 0.1 and "workers" not in header["options"]
    assert header["report"]["log"]["dataset"]["crowd"]["count"] == 1
    assert store.header["report"]["log"]["dataset"]["image_without_positives"]["count"] == 1


@pytest.mark.parametrize("workers", [1, 3])
def test_same_bytes_for_any_number_of_processes(
    tiny_coco: Path, store: SampleStore, tmp_path: Path, workers: int, monkeypatch
) -> None:
    monkeypatch.setattr(extraction, "PLAN_CHUNK", 5)
    extract(tiny_coco, tmp_path / "s", workers=workers)
    assert content(tmp_path / "s") == content(store.paths[0])


def square_plans(sides: list[int]) -> list[ImagePlan]:
    """An image for each number, with one square sample."""
    boxes = [np.float32([[1, 1, 1 + side, 1 + side]]) for side in sides]
    return [ImagePlan(n, "", (1, 1), b, b, np.zeros(1, int), b) for n, b in enumerate(boxes)]


def test_chunks_hold_few_images_and_fewer_large_ones() -> None:
    # 4096 x 4096 pixels fill a chunk, half the side a quarter of one; what is too large goes alone.
    plans = square_plans([4096, 2048, 2048, 2048, 2048, 2048, 5000] + [1] * 20)
    chunks = extraction.chunk_plans(plans)
    assert [plan for chunk in chunks for plan in chunk] == plans
    assert [len(chunk) for chunk in chunks] == [1, 4, 1, 1, 8, 8, 4]


def test_parts_together_are_the_whole(tiny_coco, store, tmp_path, monkeypatch) -> None:
    # Too much to be left uncompressed for the whole, though not for a third.
    limit = 3 * int(store.sizes.prod(axis=1).sum()) - 1
    monkeypatch.setattr(extraction, "UNCOMPRESSED_UP_TO", limit)
    for number in (1, 2, 3):
        options = ExtractionOptions(workers=0, part=(number, 3))
        extract_samples(source(tiny_coco), tmp_path / "s", options)
    parts = SampleStore(tmp_path / "s")
    assert len(parts.paths) == 3 and len(parts) == len(store)
    for i in range(len(store)):
        assert parts[i] == store[i] and parts.key(i) == store.key(i)
    assert np.array_equal(parts.gt_boxes, store.gt_boxes)
    with pytest.raises(
        DataError, match="no parts of one store"
    ):  # the last one anew, and otherwise
        again = ExtractionOptions(workers=0, part=(3, 3), negative_ratio=0.5, overwrite=True)
        extract_samples(source(tiny_coco), tmp_path / "s", again)
        SampleStore(tmp_path / "s")


def test_a_store_and_its_parts_do_not_mix(tiny_coco, tmp_path) -> None:
    whole = extract(tiny_coco, tmp_path / "s").paths[0]
    options = ExtractionOptions(workers=0, part=(1, 60), overwrite=True)
    with pytest.raises(DataError, match="is a store itself"):
        extract_samples(source(tiny_coco), whole, options)
    shutil.copytree(whole, whole / "part-1-of-2")
    with pytest.raises(DataError, match="holds a whole store and part-1-of-2"):
        SampleStore(whole)
    with pytest.raises(DataError, match="would hold no sample; .* fewer parts"):
        for number in range(1, 61):
            few = ExtractionOptions(workers=0, part=(number, 60))
            extract_samples(source(tiny_coco), tmp_path / "many", few)


def test_no_context_and_no_negatives(tiny_coco: Path, tmp_path: Path) -> None:
    store = extract(tiny_coco, tmp_path / "s", max_scale=1.0, negative_ratio=0.0)
    assert len(store) == 44 and np.array_equal(store.boxes, store.gt_boxes)


KILLED = """
import os, sys, dataclasses
sys.path[:0] = {tests!r}
from pathlib import Path
from jigsaw_d2.data import extraction
from jigsaw_d2.data.store_writer import StoreWriter
from test_extraction import ALONE, small_shards, source
extraction.CUT_CHUNK = 1
close = StoreWriter._close_shard
def close_two(writer):
    close(writer)
    if len(writer.shards) == 2:
        os.kill(os.getpid(), 9)
StoreWriter._close_shard = close_two
extraction.extract_samples(source(Path({data!r})), {path!r}, small_shards(2))
"""


def small_shards(workers: int) -> ExtractionOptions:
    return dataclasses.replace(ALONE, workers=workers, shard_size=40_000)


def test_killed_run_is_completed_by_the_same_call(tiny_coco, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(extraction, "CUT_CHUNK", 1)
    extract_samples(source(tiny_coco), tmp_path / "whole", small_shards(0))
    script = KILLED.format(tests=TESTS, data=str(tiny_coco), path=str(tmp_path / "s"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with pytest.raises(DataError, match="no whole sample store"):
        SampleStore(tmp_path / "s")
    shards = sorted((tmp_path / "s.partial" / "store").glob("shard-*.tar"))
    written = [shard.stat().st_mtime_ns for shard in shards[:2]]

    real, read = extraction.read_pixels, []
    monkeypatch.setattr(extraction, "read_pixels", lambda *args: read.append(args) or real(*args))
    extract_samples(source(tiny_coco), tmp_path / "s", small_shards(0))
    assert content(tmp_path / "s") == content(tmp_path / "whole")
    kept = [(tmp_path / "s" / shard.name).stat().st_mtime_ns for shard in shards[:2]]
    assert kept == written and 0 < len(read) < 12


FULL_DISK = """
import resource, sys
sys.path[:0] = {tests!r}
from pathlib import Path
from jigsaw_d2.data import extraction
from jigsaw_d2.tools import run_command
from test_extraction import dataclasses, small_shards, source
extraction.CUT_CHUNK = 1
options = dataclasses.replace(small_shards(2), shard_size=10**9)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # as a disk that is full
work = lambda argv: extraction.extract_samples(source(Path({data!r})), {path!r}, options)
sys.exit(run_command(work))
"""


def test_full_disk_is_named_and_the_same_call_goes_on(tiny_coco, store, tmp_path) -> None:
    script = FULL_DISK.format(tests=TESTS, data=str(tiny_coco), path=str(tmp_path / "s"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2 and "cannot write" in done.stderr and "make room" in done.stderr
    assert not (tmp_path / "s").exists()
    extract(tiny_coco, tmp_path / "s", workers=2)
    assert content(tmp_path / "s") == content(store.paths[0])


def test_each_image_is_decoded_once(tiny_coco, tmp_path, monkeypatch) -> None:
    real, decoded = image_reading.decode_jpeg, []

    def decode(data: np.ndarray, *args: object) -> np.ndarray:
        decoded.append(hash(data))
        return real(data, *args)

    monkeypatch.setattr(image_reading, "decode_jpeg", decode)
    report = extract_samples(source(tiny_coco), tmp_path / "s", ALONE)
    assert len(decoded) == len(set(decoded)) == report["images_read"] > 10


@pytest.mark.parametrize("categories, differing", [([0, 1], "'kind2'"), ([1, 0, 2], "their order")])
def test_held_out_set_must_have_the_same_categories(tiny_coco, tmp_path, categories, differing):
    names = [f"kind{n}" for n in categories]
    with pytest.raises(DataError, match=f"val has other categories.*{differing}"):
        extract_samples(source(tiny_coco, "val"), tmp_path / "s", ALONE, names)
    assert not (tmp_path / "s").exists()


ONCE = """image_missing image_truncated image_empty image_not_an_image image_16_bit
    image_size_differs image_grey image_palette image_cmyk image_alpha image_rotated
    image_id_repeated image_listed_twice annotation_repeated annotation_of_unknown_image
    annotation_of_unknown_category box_outside_image box_not_finite box_too_small box_clipped crowd
    category_ids_with_gaps"""
EXPECTED = dict.fromkeys(ONCE.split(), 1) | {"box_without_area": 2, "category_without_samples": 2}


def test_every_fault_is_named_and_counted_and_none_stops_the_run(tmp_path: Path) -> None:
    report = extract_samples(CocoSource(*make_bad_coco(tmp_path / "set")), tmp_path / "s", ALONE)
    logged = {reason: entry["count"] for reason, entry in report["log"]["dataset"].items()}
    logged.pop("image_without_room", None)
    assert logged == EXPECTED
    assert report["log"]["part"] == {}
    # L, P, CMYK, RGBA, turned, good, and the image that its one object fills.
    assert report["positives"] == 7 and report["images"] == {
        "listed": 13,
        "with_samples": 7,
        "median_sides": [60, 80],
    }
    store = SampleStore(tmp_path / "s")
    assert [store.decode(i).shape[2] for i in range(len(store))] == [3] * len(store)


def test_strict_stops_at_the_first_fault(tmp_path: Path) -> None:
    bad, strict = make_bad_coco(tmp_path / "set"), dataclasses.replace(ALONE, strict=True)
    with pytest.raises(DataError, match="stopped because of --strict"):
        extract_samples(CocoSource(*bad), tmp_path / "s", strict)
    assert not (tmp_path / "s").exists()


def test_image_that_breaks_while_extraction_runs(tiny_coco, tmp_path, monkeypatch) -> None:
    """What probing cannot see is counted when the image is decoded."""
    real = extraction.read_pixels

    def read(path: str, *args: object) -> np.ndarray:
        if path.endswith("train_003.jpg"):
            raise DataError("image_truncated")
        image = real(path, *args)
        return image[:-1] if path.endswith("train_004.jpg") else image

    monkeypatch.setattr(extraction, "read_pixels", read)
    report = extract_samples(source(tiny_coco), tmp_path / "s", ALONE)
    logged = {reason: entry["count"] for reason, entry in report["log"]["part"].items()}
    assert logged == {"image_truncated": 1, "image_size_differs": 1}
    assert report["positives"] == 36


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    write_json(tmp_path / "set.json", [], [])
    with pytest.raises(DataError, match="no usable object"):
        extract_samples(CocoSource(tmp_path / "set.json", tmp_path), tmp_path / "s", ALONE)


@pytest.mark.parametrize(
    "options",
    [{"max_scale": 0.9}, {"negative_ratio": -1}, {"quality": 0}, {"seed": -1}, {"part": (3, 2)}]
    + [{"workers": -2}, {"shard_size": 0}, {"scale_range": (1.5, 0.8)}, {"encoding": "gif"}]
    + [{"quality": 90, "encoding": encoding} for encoding in ("png", "ppm")],
)
def test_impossible_options_are_named(options: dict) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))} is "):
        ExtractionOptions(**options)


def test_samples_larger_than_some_region_shows_are_written_for_windows(tmp_path: Path) -> None:
    Image.new("RGB", (600, 400)).save(tmp_path / "a.jpg")
    entry = {"id": 1, "file_name": "a.jpg", "height": 400, "width": 600}
    # Regions 64x64 and 160x160 (S), 160 high x 64 wide (T), 64 high x 160 wide (W), over 0.8:
    # up to 80 x 80, 200 high x 80 wide, 80 high x 200 wide are always shown whole.
    sizes = [(80, 80), (81, 70), (200, 80), (200, 90), (81, 200), (80, 200)]  # (height, width)
    boxes = [[10 * n, 0, w, h] for n, (h, w) in enumerate(sizes)]
    write_json(tmp_path / "set.json", [entry], [annotation(1, box) for box in boxes])
    options = dataclasses.replace(ALONE, max_scale=1.0, negative_ratio=0.0)
    extract_samples(CocoSource(tmp_path / "set.json", tmp_path), tmp_path / "s", options)
    intervals = SampleStore(tmp_path / "s").index["interval"]
    assert (intervals > 0).tolist() == [False, True, False, True, True, False]


@pytest.mark.parametrize(
    "given, limit, encoding, quality",
    [
        # 3 bytes a pixel: 3 x 364 = 1092.
        ({}, 1092, "ppm", None),
        ({}, 1091, "jpeg", 95),
        ({"quality": 80}, 1092, "jpeg", 80),
        ({"encoding": "jpeg"}, 1092, "jpeg", 95),
        ({"encoding": "png"}, 1, "png", None),
        ({"encoding": "ppm"}, 1, "ppm", None),
    ],
)
def test_small_sets_are_left_uncompressed(monkeypatch, given, limit, encoding, quality) -> None:
    monkeypatch.setattr(extraction, "UNCOMPRESSED_UP_TO", limit)
    settled = ExtractionOptions(**given).settle_encoding(364)
    assert (settled.encoding, settled.quality) == (encoding, quality)

"""Which annotations become positives, and why the others do not."""

import pickle
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jigsaw_d2.data.report import ExtractionLog
from jigsaw_d2.data.plan import (
    ImagePlan,
    check_boxes,
    image_rng,
    plan_positives,
    take_part,
)
from jigsaw_d2.data.sources import UNKNOWN_CLASS, SourceImage

NAN, INF = float("nan"), float("inf")


def source(
    path: Path | str, boxes: list, size: tuple | None = (50, 80), **fields: list
) -> SourceImage:
    count = len(boxes)
    return SourceImage(
        7,
        str(path),
        size,
        boxes,
        fields.get("classes", [0] * count),
        fields.get("crowds", [False] * count),
    )


@pytest.mark.parametrize(
    "box, reason",
    [
        ([10, 10, 10, 20], "box_without_area"),
        ([10, 10, 30, 10], "box_without_area"),
        ([30, 10, 10, 20], "box_without_area"),
        ([10, 30, 20, 20], "box_without_area"),
        ([80, 0, 90, 10], "box_outside_image"),
        ([-20, 0, -1, 10], "box_outside_image"),
        ([0, -9, 10, 0], "box_outside_image"),
        ([NAN, 0, 10, 10], "box_not_finite"),
        ([0, 0, INF, 10], "box_not_finite"),
        ([5, 5, 6, 6], "box_too_small"),
        ([5, 5, 6.9, 40], "box_too_small"),
        ([78.5, 0, 99, 40], "box_too_small"),  # 1.5 pixels of it are inside
    ],
)
def test_unusable_boxes_have_one_reason(box: list, reason: str) -> None:
    log = ExtractionLog()
    usable, clipped = check_boxes([source("a", [box, [10, 10, 30, 30]])], [(50, 80)], 2.0, log)
    assert usable.tolist() == [False, True]
    assert log.counts == {reason: 1}
    assert np.isfinite(clipped).all() and (clipped[:, 2:] >= clipped[:, :2]).all()
    assert "a: box [" in log.examples[reason][0]


def test_crowds_and_unknown_classes_are_no_positives_but_forbid_negatives(tmp_path: Path) -> None:
    Image.new("RGB", (80, 50)).save(tmp_path / "a.png")
    boxes = [[0, 0, 20, 20], [30, 0, 50, 20], [60, 0, 80, 20], [40, 40, 41, 41]]
    image = source(
        tmp_path / "a.png",
        boxes,
        crowds=[True, False, False, False],
        classes=[0, UNKNOWN_CLASS, 1, 0],
    )
    log = ExtractionLog()
    (plan,) = plan_positives([image], seed=0, max_scale=2.0, min_side=2, log=log)
    assert plan.classes.tolist() == [1] and plan.gt_boxes.tolist() == [[60, 0, 80, 20]]
    assert log.counts == {"crowd": 1, "annotation_of_unknown_category": 1, "box_too_small": 1}
    # The enlarged positive, then every annotation.
    assert plan.forbidden.tolist() == [plan.boxes[0].tolist(), *boxes]


def test_box_over_the_border_is_clipped_and_noted() -> None:
    log = ExtractionLog()
    boxes = [[-5, 10, 20, 99], [0, 0, 80.4, 50.4]]
    usable, clipped = check_boxes([source("a", boxes)], [(50, 80)], 2.0, log)
    assert usable.all() and clipped.tolist() == [[0, 10, 20, 50], [0, 0, 80, 50]]
    assert log.counts == {"box_clipped": 1}  # four tenths of a pixel are rounding


def test_boxes_are_checked_against_the_image_that_they_are_on() -> None:
    """The same box lies inside one image, over the border of another, outside a third."""
    log = ExtractionLog()
    images = [source(name, [[10, 20, 40, 60]]) for name in "abc"] + [source("d", [])]
    sizes = [(60, 40), (30, 80), (20, 80), (50, 80)]
    usable, clipped = check_boxes(images, sizes, 2.0, log)
    assert usable.tolist() == [True, True, False]
    assert clipped.tolist() == [[10, 20, 40, 60], [10, 20, 40, 30], [0, 0, 0, 0]]
    assert {k: e[0][0] for k, e in log.examples.items()} == {
        "box_clipped": "b",
        "box_outside_image": "c",
    }
    usable, clipped = check_boxes(images[3:], sizes[3:], 2.0, log)
    assert usable.shape == (0,) and clipped.shape == (0, 4)


def test_one_pixel_objects_are_kept_where_asked_for() -> None:
    usable, _ = check_boxes([source("a", [[5, 5, 6, 6]])], [(50, 80)], 1.0, ExtractionLog())
    assert usable.all()


def test_image_faults_leave_the_other_images(tmp_path: Path) -> None:
    Image.new("RGB", (80, 50)).save(tmp_path / "good.png")
    Image.new("L", (80, 50)).save(tmp_path / "grey.png")
    (tmp_path / "empty.png").touch()
    images = [
        source(tmp_path / "missing.png", [[0, 0, 9, 9]]),
        source(tmp_path / "empty.png", [[0, 0, 9, 9]]),
        source(tmp_path / "good.png", [[0, 0, 9, 9]], size=(80, 50)),
        source(tmp_path / "good.png", [[0, 0, 9, 9]]),
        source(tmp_path / "grey.png", [], size=None),
    ]
    log = ExtractionLog()
    plans = plan_positives(images, seed=0, max_scale=2.0, min_side=2, log=log)
    assert [Path(plan.path).name for plan in plans] == ["good.png", "grey.png"]
    assert [len(plan.boxes) for plan in plans] == [1, 0]
    assert log.counts == {
        "image_missing": 1,
        "image_empty": 1,
        "image_size_differs": 1,
        "image_grey": 1,
        "image_without_positives": 1,
    }


def test_streams_of_images_and_purposes_differ() -> None:
    draws = {
        image_rng(seed, image, stream).random()
        for seed in (0, 1)
        for image in (0, 1, -1, 2**62)
        for stream in (0, 1)
    }
    assert len(draws) == 16
    assert image_rng(3, 5, 0).random() == image_rng(3, 5, 0).random()


def test_parts_are_consecutive_whole_and_alike() -> None:
    def plan(image_id: int, count: int) -> ImagePlan:
        boxes = np.zeros((count, 4), np.float32)
        return ImagePlan(image_id, "", (1, 1), boxes, boxes, np.zeros(count, np.int64), boxes)

    counts = [3, 1, 0, 4, 1, 5, 9, 2, 6, 5, 0, 3]
    plans = [plan(n, count) for n, count in enumerate(counts)]
    parts = [take_part(plans, (n, 4)) for n in (1, 2, 3, 4)]
    assert [p.image_id for part in parts for p in part] == [n for n, c in enumerate(counts) if c]
    assert all(abs(sum(len(p.boxes) for p in part) - 39 / 4) < 9 for part in parts)


def test_a_plan_is_whole_on_the_other_side_of_a_pipe() -> None:
    boxes = np.arange(8, dtype=np.float32).reshape(2, 4)
    plans = [
        ImagePlan(7, "a.jpg", (5, 6), boxes, boxes + 1, np.array([3, 4]), boxes[:1], "RGB"),
        ImagePlan(-1, "b.jpg", (1, 1), boxes[:0], boxes[:0], np.zeros(0, np.int64), boxes[:0]),
    ]
    for plan, copy in zip(plans, pickle.loads(pickle.dumps(plans))):
        for field in fields(ImagePlan):
            one, other = getattr(plan, field.name), getattr(copy, field.name)
            assert np.array_equal(one, other) and type(one) is type(other), field.name
            if isinstance(one, np.ndarray):
                assert (one.dtype, one.shape) == (other.dtype, other.shape), field.name

"""Which annotations become positives, and where negatives lie: the ratio holds over the dataset."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jigsaw_d2.data.plan import (
    ImagePlan,
    add_negatives,
    check_boxes,
    plan_positives,
    take_part,
)
from jigsaw_d2.data.report import ExtractionLog
from jigsaw_d2.data.samples import GROUPS, enlarge_boxes, group_codes, overlaps_any
from jigsaw_d2.data.sources import UNKNOWN_CLASS, Annotation, SourceImage

NAN, INF = float("nan"), float("inf")


def source(
    path: Path | str, boxes: list, size: tuple | None = (50, 80), **fields: list
) -> SourceImage:
    count = len(boxes)
    classes, crowds = fields.get("classes", [0] * count), fields.get("crowds", [False] * count)
    return SourceImage(7, str(path), size, list(map(Annotation, boxes, classes, crowds)))


@pytest.mark.parametrize(
    "box, reason",
    [
        ([10, 10, 30, 10], "box_without_area"),
        ([30, 10, 10, 20], "box_without_area"),
        ([80, 0, 90, 10], "box_outside_image"),
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
    usable, clipped = check_boxes(source("a", [box, [10, 10, 30, 30]]), (50, 80), 2.0, log)
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
    plan = plan_positives(image, 0, 2.0, 2, log)
    assert plan.classes.tolist() == [1] and plan.gt_boxes.tolist() == [[60, 0, 80, 20]]
    assert log.counts == {"crowd": 1, "annotation_of_unknown_category": 1, "box_too_small": 1}
    # The enlarged positive, then every annotation.
    assert plan.forbidden.tolist() == [plan.boxes[0].tolist(), *boxes]


def test_box_over_the_border_is_clipped_and_noted() -> None:
    log = ExtractionLog()
    boxes = [[-5, 10, 20, 99], [0, 0, 80.4, 50.4]]
    usable, clipped = check_boxes(source("a", boxes), (50, 80), 2.0, log)
    assert usable.all() and clipped.tolist() == [[0, 10, 20, 50], [0, 0, 80, 50]]
    assert log.counts == {"box_clipped": 1}  # four tenths of a pixel are rounding


def test_parts_are_consecutive_whole_and_alike() -> None:
    def plan(image_id: int, count: int) -> ImagePlan:
        boxes = np.zeros((count, 4), np.float32)
        return ImagePlan(image_id, "", (1, 1), boxes, boxes, np.zeros(count, np.int64), boxes)

    counts = [3, 1, 0, 4, 1, 5, 9, 2, 6, 5, 0, 3]
    plans = [plan(n, count) for n, count in enumerate(counts)]
    parts = [take_part(plans, (n, 4)) for n in (1, 2, 3, 4)]
    assert [p.image_id for part in parts for p in part] == [n for n, c in enumerate(counts) if c]
    assert all(abs(sum(len(p.boxes) for p in part) - 39 / 4) < 9 for part in parts)


BACKGROUND = 3


def make_plans(
    rng: np.random.Generator, images: int, objects: int, size: tuple[int, int] = (300, 400)
) -> list[ImagePlan]:
    """Images with up to ``objects`` boxes of all shapes, and now and then a crowd."""
    plans = []
    for image_id in range(images):
        count = int(rng.integers(0, objects + 1))
        sides = rng.uniform(8, 60, (count, 2))
        corners = rng.uniform(0, 1, (count, 2)) * (np.array(size[::-1]) - sides)
        gt = np.concatenate([corners, corners + sides], 1).astype(np.float32)
        boxes = enlarge_boxes(gt, size, rng)
        crowd = np.float32([[0, 0, 100, 80]] if image_id % 5 == 0 else np.zeros((0, 4)))
        classes = rng.integers(0, BACKGROUND, count)
        forbidden = np.concatenate([boxes, gt, crowd])
        plans.append(ImagePlan(image_id, f"{image_id}", size, boxes, gt, classes, forbidden))
    return plans


def place(plans: list[ImagePlan], wanted: int) -> tuple[list, ExtractionLog]:
    log = ExtractionLog()
    return add_negatives(plans, wanted, BACKGROUND, 0, log), log


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.integers(5, 60), st.integers(1, 12))
def test_ratio_holds_and_nothing_overlaps(seed: int, images: int, objects: int) -> None:
    plans = make_plans(np.random.default_rng(seed), images, objects)
    positives = sum(len(plan.boxes) for plan in plans)
    if positives == 0:
        return
    wanted = round(positives / 10)
    done, _ = place(plans, wanted)
    negatives = 0
    for before, after in zip(plans, done):
        count = len(before.boxes)
        added = after.boxes[count:]
        assert np.array_equal(after.boxes[:count], before.boxes)
        assert (after.classes[count:] == BACKGROUND).all()
        assert np.array_equal(after.gt_boxes[count:], added)
        assert not overlaps_any(added, before.forbidden).any()
        assert (added == np.rint(added)).all() and (added[:, :2] >= 0).all()
        assert (added[:, 2:] <= [400, 300]).all()
        negatives += len(added)
    assert negatives == wanted


@pytest.mark.parametrize("full, placed", [(15, 40), (20, 0)])
def test_full_images_pass_their_share_on(full: int, placed: int) -> None:
    plans = make_plans(np.random.default_rng(0), 20, 6)
    for plan in plans[:full]:
        plan.forbidden = np.float32([[0, 0, 400, 300]])
    done, log = place(plans, 40)
    counts = [len(after.boxes) - len(before.boxes) for before, after in zip(plans, done)]
    assert sum(counts) == placed and not any(counts[:full])
    assert log.counts["image_without_room"] >= full


def test_all_groups_receive_negatives_of_the_positives_sizes() -> None:
    plans = make_plans(np.random.default_rng(1), 100, 8)
    positives = np.concatenate([plan.boxes for plan in plans])
    done, _ = place(plans, len(positives))
    negatives = np.concatenate([d.boxes[len(p.boxes) :] for p, d in zip(plans, done)])

    def shares(boxes: np.ndarray) -> np.ndarray:
        sides = boxes[:, 2:] - boxes[:, :2]
        codes = group_codes(sides[:, 0], sides[:, 1])
        return np.bincount(codes, minlength=len(GROUPS)) / len(boxes)

    assert np.allclose(shares(negatives), shares(positives), atol=0.06)
    sizes = {tuple(size) for size in positives[:, 2:] - positives[:, :2]}
    assert all(tuple(size) in sizes for size in negatives[:, 2:] - negatives[:, :2])

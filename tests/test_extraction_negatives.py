"""The ratio holds over the dataset, and no negative touches anything annotated."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jigsaw_d2.extraction import negatives as extraction_negatives
from jigsaw_d2.extraction import plan as extraction_plan
from jigsaw_d2.data.report import ExtractionLog
from jigsaw_d2.data.plan import add_negatives, choose_sizes, split_negatives
from jigsaw_d2.data.plan import ImagePlan
from jigsaw_d2.data.extraction import Workers
from jigsaw_d2.data.samples import GROUPS, enlarge_boxes, group_codes, overlaps_any

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


def place(plans: list[ImagePlan], wanted: int, workers: int = 0) -> tuple[list, ExtractionLog]:
    log = ExtractionLog()
    with Workers(workers) as pool:
        return add_negatives(plans, wanted, BACKGROUND, 0, pool, log), log


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


def test_full_images_pass_their_share_on() -> None:
    plans = make_plans(np.random.default_rng(0), 20, 6)
    whole = np.float32([[0, 0, 400, 300]])
    for plan in plans[:15]:
        plan.forbidden = whole
    done, log = place(plans, 40)
    counts = [len(after.boxes) - len(before.boxes) for before, after in zip(plans, done)]
    assert sum(counts) == 40 and not any(counts[:15])
    assert log.counts["image_without_room"] >= 15


def test_without_any_room_extraction_goes_on() -> None:
    plans = make_plans(np.random.default_rng(0), 6, 6)
    for plan in plans:
        plan.forbidden = np.float32([[0, 0, 400, 300]])
    done, log = place(plans, 12)
    assert sum(len(plan.boxes) for plan in done) == sum(len(plan.boxes) for plan in plans)
    assert log.counts["image_without_room"] == 6


def test_all_groups_receive_negatives_of_the_positives_sizes() -> None:
    plans = make_plans(np.random.default_rng(1), 100, 8)
    positives = np.concatenate([plan.boxes for plan in plans])
    done, _ = place(plans, len(positives))
    negatives = np.concatenate([d.boxes[len(p.boxes) :] for p, d in zip(plans, done)])

    def shares(boxes: np.ndarray) -> np.ndarray:
        sides = boxes[:, 2:] - boxes[:, :2]
        return np.bincount(group_codes(sides[:, 0], sides[:, 1]), minlength=len(GROUPS)) / len(
            boxes
        )

    assert np.allclose(shares(negatives), shares(positives), atol=0.06)
    sizes = {tuple(size) for size in positives[:, 2:] - positives[:, :2]}
    assert all(tuple(size) in sizes for size in negatives[:, 2:] - negatives[:, :2])


def test_the_same_for_any_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction_plan, "PLAN_CHUNK", 7)
    plans = make_plans(np.random.default_rng(2), 30, 8)
    (alone, _), (shared, _) = place(plans, 25), place(plans, 25, workers=3)
    assert all(np.array_equal(a.boxes, b.boxes) for a, b in zip(alone, shared))


def test_quotas_are_even_and_complete() -> None:
    quotas = split_negatives(103, 10, 0)
    assert quotas.sum() == 103 and set(quotas) == {10, 11}
    assert split_negatives(3, 10, 0).sum() == 3
    assert not np.array_equal(split_negatives(3, 10, 0), split_negatives(3, 10, 1))


def test_many_sizes_are_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction_negatives, "MAX_SIZES", 50)
    sizes = choose_sizes(make_plans(np.random.default_rng(0), 60, 8), 0)
    assert sizes.shape == (50, 2)

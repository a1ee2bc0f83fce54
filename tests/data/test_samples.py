"""Geometry of positives and negatives, on random boxes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jigsaw_d2.data.samples import (
    clip_boxes,
    enlarge_box,
    enlarge_boxes,
    overlaps_any,
    sample_backgrounds,
    shape_group,
)

seeds = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize(
    "width, height, group",
    [(1, 2, "S"), (3, 2, "S"), (49, 100, "T"), (151, 100, "W"), (7, 7, "S"), (1, 1, "S")],
)
def test_shape_group_counts_both_bounds_as_square_like(width: int, height: int, group: str) -> None:
    assert shape_group(width, height) == group


@st.composite
def image_and_box(draw: st.DrawFn) -> tuple[tuple[int, int], np.ndarray]:
    """An image size and a float box with some area inside it, perhaps reaching over the border."""
    height, width = draw(st.integers(1, 400)), draw(st.integers(1, 400))
    x0, y0 = (draw(st.floats(-50, side - 0.25)) for side in (width, height))
    x1 = draw(st.floats(max(x0, 0) + 0.125, width + 50))
    y1 = draw(st.floats(max(y0, 0) + 0.125, height + 50))
    return (height, width), np.array([x0, y0, x1, y1], np.float32)


@settings(max_examples=400)
@given(image_and_box(), seeds, st.sampled_from([1.0, 1.3, 2.0, 3.0]))
def test_positive_contains_its_box_and_is_at_most_max_scale(
    case: tuple[tuple[int, int], np.ndarray], seed: int, max_scale: float
) -> None:
    (height, width), box = case
    sample = enlarge_box(box, (height, width), np.random.default_rng(seed), max_scale)
    clipped = clip_boxes(box, (height, width))[0].astype(np.float64)
    assert sample.dtype == np.float32 and (sample == np.rint(sample)).all()
    assert (sample[:2] >= 0).all() and sample[2] <= width and sample[3] <= height
    assert (sample[:2] <= clipped[:2]).all() and (sample[2:] >= clipped[2:]).all()
    # Whole pixels: the pixels that the box touches may be more than max_scale times a tiny box.
    touched = np.ceil(clipped[2:]) - np.floor(clipped[:2])
    allowed = np.maximum(max_scale * (clipped[2:] - clipped[:2]), touched)
    assert (sample[2:] - sample[:2] <= allowed + 1e-9).all()


def test_no_enlargement_gives_the_touched_pixels() -> None:
    rng = np.random.default_rng(0)
    assert enlarge_box([10.2, 20, 30.5, 39.9], (100, 100), rng, 1.0).tolist() == [10, 20, 31, 40]


def test_each_side_moves_on_its_own_by_up_to_half_the_box() -> None:
    boxes = np.tile(np.float32([100, 200, 140, 300]), (4000, 1))  # 40 x 100
    moved = np.abs(enlarge_boxes(boxes, (600, 600), np.random.default_rng(0)) - boxes)
    # Uniform on [0, 0.5 x side]: mean a quarter of the side, 20 and 50 pixels at most.
    assert np.allclose(moved.mean(0), [10, 25, 10, 25], rtol=0.05)
    assert moved.max(0).tolist() == [20, 50, 20, 50]
    assert abs(np.corrcoef(moved.T) - np.eye(4)).max() < 0.06


def test_box_without_area_inside_and_shrinking_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="no area inside the image"):
        enlarge_box([20, 0, 30, 5], (10, 10), rng)
    with pytest.raises(ValueError, match="max_scale is 0.5"):
        enlarge_box([2, 0, 3, 5], (10, 10), rng, 0.5)


def test_touching_edges_do_not_overlap() -> None:
    box = np.float32([[10, 10, 20, 20]])
    others = np.float32([[20, 10, 30, 20], [0, 0, 10, 10], [15, 15, 15, 30]])
    assert not overlaps_any(box, others).any()
    assert overlaps_any(box, np.float32([[19, 19, 25, 25]])).all()


@settings(max_examples=150)
@given(seeds, st.integers(0, 12), st.integers(1, 8))
def test_backgrounds_touch_nothing_forbidden_and_have_wanted_sizes(
    seed: int, forbidden_count: int, wanted: int
) -> None:
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 200, (forbidden_count, 2))
    forbidden = np.concatenate([corners, corners + rng.uniform(0, 80, corners.shape)], 1)
    sizes = rng.integers(1, 90, (wanted, 2))
    found = sample_backgrounds(forbidden.astype(np.float32), (150, 250), sizes, rng)
    assert not overlaps_any(found, forbidden.astype(np.float32)).any()
    assert (found[:, :2] >= 0).all() and (found[:, 2:] <= [250, 150]).all()
    left = [tuple(size) for size in sizes]
    for size in (found[:, 2:] - found[:, :2]).astype(int):
        left.remove(tuple(size))  # raises where a size was not asked for


def test_backgrounds_are_the_first_free_of_their_places() -> None:
    """Against plain loops over the same draws, in a crowded image."""
    rng = np.random.default_rng(5)
    low, wanted = rng.integers(0, 90, (60, 2)), rng.integers(5, 30, (12, 2))
    forbidden = np.concatenate([low, low + rng.integers(0, 15, low.shape)], 1)
    found = sample_backgrounds(forbidden, (100, 120), wanted, np.random.default_rng(0))
    expected, tries = [], np.random.default_rng(0).random((len(wanted), 50, 2))
    for size, draws in zip(wanted, tries):
        for draw in draws:
            x, y = np.floor(draw * ((120, 100) - size + 1))
            box = [x, y, x + size[0], y + size[1]]
            inner = [(max(box[0], f[0]), max(box[1], f[1])) for f in forbidden]
            outer = [(min(box[2], f[2]), min(box[3], f[3])) for f in forbidden]
            if not any(a < c and b < d for (a, b), (c, d) in zip(inner, outer)):
                expected.append(box)
                break
    assert found.tolist() == expected and 0 < len(found) < len(wanted)


def test_no_room_gives_no_background() -> None:
    rng = np.random.default_rng(0)
    whole = np.float32([[0, 0, 100, 100]])
    assert sample_backgrounds(whole, (100, 100), [[10, 10]], rng).shape == (0, 4)
    assert sample_backgrounds(whole[:0], (100, 100), [[101, 5]], rng).shape == (0, 4)
    # One free place exactly: the left ten columns.
    found = sample_backgrounds(np.float32([[10, 0, 100, 100]]), (100, 100), [[10, 100]], rng, 2000)
    assert found.tolist() == [[0, 0, 10, 100]]

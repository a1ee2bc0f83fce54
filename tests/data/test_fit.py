"""How samples fill a template, by hand; the template that suits them, against brute force."""

import numpy as np
import pytest

from jigsaw_d2.data.fit import (
    PAPER_CUT,
    canvas_fill,
    detector_scale,
    expected_pixels,
    fit_scale,
    fit_template,
    template_fill,
)
from jigsaw_d2.data.sampler import JigsawSampler
from jigsaw_d2.data.samples import GROUPS, group_codes
from jigsaw_d2.data.template import JigsawTemplate

TEMPLATE = JigsawTemplate()


def samples(*rows: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Sizes (n, 2) and groups (n,) of rows (count, width, height)."""
    sizes = np.concatenate([np.tile([height, width], (n, 1)) for n, width, height in rows])
    return sizes, group_codes(sizes[:, 1], sizes[:, 0])


def drawn(long_sides: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Samples of these longer sides, all three shapes."""
    rng = np.random.default_rng(seed)
    ratio = rng.choice([0.3, 0.8, 1.0, 1 / 0.3], len(long_sides))
    sides = np.stack([np.minimum(1, 1 / ratio), np.minimum(1, ratio)], axis=1)
    sizes = np.maximum(1, np.round(sides * long_sides[:, None])).astype(np.int64)
    return sizes, group_codes(sizes[:, 1], sizes[:, 0])


def test_fill_of_equal_samples() -> None:
    """All S are 80 x 80, at scale 1: R1 (64 x 64) is full and shows 64 of 80 pixels per side;
    R4 (160 x 160) holds them whole, a quarter used. T 32 x 80 in R3 (160 high, 64 wide)."""
    sizes, groups = samples((9, 80, 80), (4, 32, 80))
    fill = template_fill(sizes, groups, TEMPLATE, (1.0, 1.0))
    assert fill["R1"] == {"used": 1, "padded": 0, "cropped": pytest.approx(1 - 0.64)}
    assert fill["R4"] == {"used": 0.25, "padded": 0.75, "cropped": 0}
    assert fill["R3"] == {"used": 0.25, "padded": 0.75, "cropped": 0}
    assert fill["R2"] is None
    # the canvas: 64 x 64 + 80 x 80 + 32 x 80 of 224 x 224 shown, of 2 x 80 x 80 + 32 x 80 pixels
    shown, whole = 64**2 + 80**2 + 32 * 80, 2 * 80**2 + 32 * 80
    expected = (shown / 224**2, 1 - shown / whole, shown / 224**2)
    assert canvas_fill(sizes, groups, TEMPLATE, (1.0, 1.0)) == pytest.approx(expected)


def test_the_larger_of_two_samples_goes_to_r4() -> None:
    """Half 32 x 32, half 160 x 160. Ranks (i + 1/2) / n: a small one is the larger of two in a
    quarter of its pairs, a large one in three quarters."""
    sizes, groups = samples((500, 32, 32), (500, 160, 160))
    fill = template_fill(sizes, groups, TEMPLATE, (1.0, 1.0))
    assert fill["R4"]["used"] == pytest.approx(0.25 * (32 / 160) ** 2 + 0.75, abs=1e-3)
    assert fill["R1"]["used"] == pytest.approx(0.75 * (32 / 64) ** 2 + 0.25, abs=1e-3)
    assert fill["R1"]["cropped"] == pytest.approx(0.25 * (1 - 0.4**2), abs=1e-3)


def test_enlarged_samples_show_fewer_stored_pixels() -> None:
    """40 x 40 at scale 2 is 80 x 80: a quarter as many stored pixels as canvas pixels."""
    sizes, groups = samples((9, 40, 40))
    fill = canvas_fill(sizes, groups, TEMPLATE, (2.0, 2.0))
    assert fill.distinct == pytest.approx(fill.used / 4)


@pytest.mark.parametrize("size_aware", [False, True])
def test_expected_pixels_are_those_of_the_draws(size_aware) -> None:
    """Against the sampler's own pairs over many passes, sorted as the mapper sorts them."""
    sizes, groups = drawn(np.random.default_rng(1).uniform(20, 300, 41))
    sampler = JigsawSampler(sizes=sizes, groups=groups, seed=0, size_aware=size_aware)
    shown = np.zeros(2)
    count = 4000
    for position in range(count):
        pair = sizes[sampler.quadruple(position)[:2]]
        small, large = pair[np.argsort(pair.prod(axis=1))]
        shown += [np.minimum(small, 64).prod(), np.minimum(large, 160).prod()]
    found = expected_pixels(sizes, groups, TEMPLATE, (1.0, 1.0), size_aware)
    assert found[[0, 3], 0] == pytest.approx(shown / count, rel=0.02)


def test_size_aware_draws_show_more() -> None:
    sizes, groups = drawn(np.random.default_rng(2).lognormal(4.3, 0.7, 3000))
    plain, aware = (canvas_fill(sizes, groups, TEMPLATE, (0.8, 1.5), on) for on in (False, True))
    assert aware.distinct > 1.05 * plain.distinct and aware.cut < plain.cut


@pytest.mark.parametrize(
    "sides, min_size, max_size, scale",
    [
        ((480, 640), 800, 1333, 800 / 480),  # COCO, under the zoo's detectors
        ((200, 200), 256, 256, 1.28),
        ((480, 1920), 800, 1333, 1333 / 1920),  # held back by the longer side
        ((480, 640), 0, 1333, 1.0),  # images as they are
    ],
)
def test_scale_of_a_detector(sides, min_size, max_size, scale) -> None:
    assert detector_scale(sides, min_size, max_size) == pytest.approx(scale)


def test_scale_is_the_papers_under_the_papers_detector() -> None:
    assert fit_scale(detector_scale((480, 640), 800, 1333)) == (0.8, 1.5)
    assert fit_scale(1.0) == (0.48, 0.9)


@pytest.mark.parametrize(
    "side, canvas, split, distinct",
    [
        # 64 / 32 shows two of them whole; any other canvas is larger and shows no more
        (30, 64, 32, 2 * 30**2 / 64**2),
        # 64 / 32 would cut 90 %; 96 / 32 shows 5120 of 9216 pixels, 128 / 32 more: 10240 of 16384,
        # 128 / 64 half of all, 160 / 64 13312 of 25600
        (100, 128, 32, (32**2 + 96**2) / 128**2),
        # nothing is roomy: 480 pixels a side is the most that a region of 512 shows
        (4000, 512, 32, (32**2 + 480**2) / 512**2),
    ],
)
def test_canvas_for_squares_of_one_size(side, canvas, split, distinct) -> None:
    fit = fit_template(*samples((9, side, side)), (1.0, 1.0))
    assert (fit.template.width, fit.template.split_x) == (canvas, split)
    assert (fit.template.height, fit.template.split_y) == (canvas, split)
    assert fit.fill.distinct == pytest.approx(distinct)


def test_choice_is_the_best_of_all_that_are_roomy() -> None:
    sizes, groups = drawn(np.random.default_rng(4).lognormal(4.3, 0.7, 2000))
    fit = fit_template(sizes, groups, (0.8, 1.5), stride=16, max_side=160)
    others = [
        canvas_fill(sizes, groups, JigsawTemplate(side, side, split, split), (0.8, 1.5))
        for side in range(32, 161, 16)
        for split in range(16, side // 2 + 1, 16)
    ]
    assert fit.fill.cut <= PAPER_CUT
    assert fit.fill.distinct == max(o.distinct for o in others if o.cut <= PAPER_CUT)
    assert fit.template.width <= 160 and fit.template.width % 16 == fit.template.split_x % 16 == 0


def test_a_missing_group_does_not_matter() -> None:
    sizes, groups = samples((50, 90, 90))
    assert (groups == GROUPS.index("S")).all()
    assert fit_template(sizes, groups, (1.0, 1.0)).fill.cut <= PAPER_CUT

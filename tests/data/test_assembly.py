"""Fitting samples into regions, against the long way: resize all, flip, crop, pad."""

import cv2
import numpy as np
import pytest

from jigsaw_d2.data.assembly import (
    METHODS,
    Augmentation,
    Placement,
    assemble,
    fit_to_region,
    paint,
    place_sample,
)
from jigsaw_d2.data.template import JigsawTemplate

REGION = (64, 160)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 (height, width, 3) with strong edges, so that a shift of a tenth of a pixel shows."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def draw(rng: np.random.Generator, low: float = 0.8, high: float = 1.5) -> Augmentation:
    return Augmentation(rng.uniform(low, high), bool(rng.random() < 0.5), *rng.random(2))


def long_way(image: np.ndarray, region: tuple[int, int], placement) -> np.ndarray:
    """Whole sample resized, flipped, cropped at the mirrored position, padded."""
    y, x = placement.y, placement.x
    whole = cv2.resize(image, None, fx=1 / x.step, fy=1 / y.step, interpolation=cv2.INTER_LINEAR)
    assert whole.shape[:2] == (y.resized, x.resized)
    left = x.crop
    if placement.flip:
        whole, left = whole[:, ::-1], x.resized - x.crop - x.shown
    out = np.zeros((*region, 3), np.uint8)
    shown = whole[y.crop : y.crop + y.shown, left : left + x.shown]
    out[y.paste : y.paste + y.shown, x.paste : x.paste + x.shown] = shown
    return out


def assert_long_way(image: np.ndarray, region: tuple[int, int], augmentation) -> Placement:
    """The sample's window alone gives the pixels of ``long_way``, to the rounding of one level."""
    placement = place_sample(image.shape[:2], region, "pad_crop", augmentation)
    x0, y0, x1, y1 = placement.window
    out = np.zeros((*region, 3), np.uint8)
    paint(image[y0:y1, x0:x1], placement, out)
    expected = long_way(image, region, placement)
    assert np.abs(out.astype(int) - expected).max() <= 1, placement
    return placement


def test_window_alone_gives_the_pixels_of_the_long_way():
    rng = np.random.default_rng(0)
    cropped = 0
    for number in range(400):
        size = tuple(int(v) for v in rng.integers(1, 420, 2))
        region = [(64, 64), (64, 160), (160, 64), (160, 160)][number % 4]
        placement = assert_long_way(picture(*size, number), region, draw(rng))
        cropped += placement.x.crop > 0
    assert cropped > 50  # the comparison is about crops


@pytest.mark.parametrize("scale", [0.995, 0.998, 1.002, 1.005])
def test_ratios_next_to_one(scale):
    # Windows that keep their size though their step is not 1, which cv2.resize would copy.
    for number in range(20):
        draws = np.random.default_rng(number).random(2)
        image = picture(270 + number, 300, number)
        assert_long_way(image, (64, 64), Augmentation(scale, number % 2 == 0, *draws))


def test_resized_size_follows_the_drawn_ratio_within_a_pixel():
    rng = np.random.default_rng(1)
    for _ in range(2000):
        size, augmentation = tuple(int(v) for v in rng.integers(1, 600, 2)), draw(rng)
        placement = place_sample(size, REGION, "pad_crop", augmentation)
        for length, axis in zip(size, placement[:2]):
            assert axis.resized == max(1, round(length * augmentation.scale))
            # step is what resizing to whole pixels rounds to, moved by less than half a pixel more
            assert abs(length / axis.step - axis.resized) <= 0.45 + 1e-9
            assert axis.first == pytest.approx(axis.anchor * axis.step, abs=1e-9)
            assert 0 <= axis.first < axis.last <= length


def test_crop_positions_are_uniform_over_all():
    # 100 wide at ratio 1 in a region of 90: positions 0..10
    rng = np.random.default_rng(3)
    draws = [Augmentation(1.0, False, 0.5, x) for x in rng.random(11000)]
    crops = [place_sample((20, 100), (64, 90), "pad_crop", one).x.crop for one in draws]
    counts = np.bincount(crops, minlength=11)
    assert len(counts) == 11
    # each count is binomial(11000, 1/11): mean 1000, standard deviation 30
    assert np.abs(counts - 1000).max() < 4.5 * 30


@pytest.mark.parametrize(
    "size, paste", [((10, 20), (27, 70)), ((11, 21), (26, 69)), ((1, 1), (31, 79))]
)
def test_padding_is_centred_and_zero(size, paste):
    # (64 - 10) / 2 = 27, (160 - 20) / 2 = 70; odd remainders leave the extra pixel behind
    image = np.full((*size, 3), 7, np.uint8)
    out = fit_to_region(image, REGION, "pad_crop", np.random.default_rng(0))
    expected = np.zeros((*REGION, 3), np.uint8)
    expected[paste[0] : paste[0] + size[0], paste[1] : paste[1] + size[1]] = 7
    assert (out == expected).all()


def test_warp_fills_the_region_and_resize_keeps_the_aspect():
    image = np.full((100, 100, 3), 9, np.uint8)
    rng = np.random.default_rng(0)
    assert (fit_to_region(image, REGION, "warp", rng) == 9).all()
    kept = fit_to_region(image, REGION, "resize", rng)
    # ratio min(64 / 100, 160 / 100) = 0.64: 64 x 64 in the middle of 64 x 160
    assert (kept[:, 48:112] == 9).all() and not kept[:, :48].any() and not kept[:, 112:].any()


@pytest.mark.parametrize("method", ["warp", "resize"])
def test_fitting_by_size_ignores_the_drawn_ratio(method):
    placements = {
        place_sample((90, 33), REGION, method, Augmentation(scale, False)) for scale in (0.8, 1.5)
    }
    assert len(placements) == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (64, 160), (700, 900)])
def test_any_size_fits_any_region(method, size):
    image = np.full((*size, 3), 200, np.uint8)
    out = fit_to_region(image, REGION, method, np.random.default_rng(0))
    assert out.shape == (*REGION, 3) and out.dtype == np.uint8
    assert set(np.unique(out)) <= {0, 200} and (out == 200).any()


def test_assemble_puts_each_sample_into_its_region():
    template = JigsawTemplate()
    images = [np.full((300, 300, 3), value, np.uint8) for value in (10, 20, 30, 40)]
    canvas = assemble(images, template, "pad_crop", np.random.default_rng(0))
    for value, (x0, y0, x1, y1) in zip((10, 20, 30, 40), template.boxes):
        assert (canvas[y0:y1, x0:x1] == value).all()


def test_unknown_method_is_named():
    with pytest.raises(ValueError, match="'squeeze'.*pad_crop, warp, resize"):
        fit_to_region(picture(5, 5), REGION, "squeeze", np.random.default_rng(0))

"""One Jigsaw image from its number: the draws, the regions, damage, options."""

import cv2
import numpy as np
import pytest
import torch
from data.test_store import flip
from helpers_store import make_store

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.data.assembly import place_sample
from jigsaw_d2.data.dataset_mapper import JigsawDatasetMapper, annotated_windows
from jigsaw_d2.data.store import DamagedSampleError, SampleStore
from jigsaw_d2.data.template import JigsawTemplate
from jigsaw_d2.io import ConfigError


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> SampleStore:
    return make_store(tmp_path_factory.mktemp("mapper") / "store", size_range=(20, 420))


def make_mapper(store: SampleStore, **options) -> JigsawDatasetMapper:
    return JigsawDatasetMapper(store=store, template=JigsawTemplate(), **options)


def quadruple(store: SampleStore, rng: np.random.Generator) -> np.ndarray:
    """Any two S, one T, one W of ``make_store``, whose groups take turns."""
    return 3 * rng.integers(0, len(store) // 3, 4) + [0, 0, 1, 2]


def long_way(mapper: JigsawDatasetMapper, position: int, made: dict) -> np.ndarray:
    """uint8 (3, H, W) by decoding whole samples, resizing, flipping, cropping and padding."""
    canvas = np.zeros((224, 224, 3), np.uint8)
    rows = zip(made["sample_ids"].tolist(), mapper.template.boxes.tolist())
    for (i, (x0, y0, x1, y1)), augmentation in zip(rows, mapper.draw_augmentations(position)):
        image = cv2.cvtColor(cv2.imdecode(np.frombuffer(mapper.store[i], np.uint8), 1), 4)
        height, width = mapper.store.sizes[i].tolist()
        y, x, flip, _ = place_sample((height, width), (y1 - y0, x1 - x0), "pad_crop", augmentation)
        image = cv2.resize(image, None, fx=1 / x.step, fy=1 / y.step)
        left = x.crop
        if flip:
            image, left = image[:, ::-1], x.resized - x.crop - x.shown
        shown = image[y.crop : y.crop + y.shown, left : left + x.shown]
        top, left = y0 + y.paste, x0 + x.paste
        canvas[top : top + y.shown, left : left + x.shown] = shown
    return canvas.transpose(2, 0, 1)


@pytest.mark.parametrize("encoding", ["jpeg", "png", "ppm"])
def test_image_equals_the_long_way(tmp_path, encoding):
    store = make_store(tmp_path / "store", size_range=(20, 420), encoding=encoding)
    mapper, rng = make_mapper(store), np.random.default_rng(0)
    for position in range(60):
        made = mapper({"position": position, "sample_ids": quadruple(store, rng)})
        difference = np.abs(made["image"].numpy().astype(int) - long_way(mapper, position, made))
        assert difference.max() <= 1


def test_smaller_square_is_always_in_r1(store):
    mapper, rng = make_mapper(store), np.random.default_rng(1)
    for position in range(100):
        quad = quadruple(store, rng)
        r1, r2, r3, r4 = mapper({"position": position, "sample_ids": quad})["sample_ids"].tolist()
        assert store.sizes[r1].prod() <= store.sizes[r4].prod()
        assert [r2, r3] == [quad[3], quad[2]] and {r1, r4} == set(quad[:2].tolist())


def test_number_and_seed_alone_make_the_image(store):
    record = {"position": 12, "sample_ids": np.array([0, 3, 1, 2])}
    walked = make_mapper(store)
    for position in range(12):
        walked({"position": position, "sample_ids": np.array([3, 6, 4, 5])})
    first = walked(record)["image"]
    assert torch.equal(first, make_mapper(store)(record)["image"])
    assert not torch.equal(first, make_mapper(store, seed=1)(record)["image"])
    assert not torch.equal(first, make_mapper(store)({**record, "position": 13})["image"])


def test_distribution_of_the_draws(store):
    mapper = make_mapper(store)
    draws = np.array([mapper.draw_augmentations(p) for p in range(2000)])  # (2000, 4, 4)
    scales, flips, crops = draws[..., 0], draws[..., 1], draws[..., 2:]
    assert scales.min() >= 0.8 and scales.max() < 1.5
    # Kolmogorov-Smirnov distance from uniform: 1.63 / sqrt(8000) = 0.018 at the 1 % level
    for values in ((scales - 0.8) / 0.7, crops[..., 0], crops[..., 1]):
        ordered = np.sort(values.ravel())
        steps = np.arange(1, ordered.size + 1) / ordered.size
        assert np.abs(ordered - steps).max() < 1.63 / np.sqrt(ordered.size)
    # binomial(8000, 0.5): deviation of the mean 0.0056
    assert abs(flips.mean() - 0.5) < 3 * 0.0056
    # Samples of an image, and images in turn, are drawn independently.
    assert abs(np.corrcoef(scales.T)[np.triu_indices(4, 1)]).max() < 0.08
    assert abs(np.corrcoef(scales[:-1, 0], scales[1:, 0])[0, 1]) < 0.08


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_flip_probability_ends(store, prob):
    mapper = make_mapper(store, flip_prob=prob)
    assert {a.flip for p in range(50) for a in mapper.draw_augmentations(p)} == {bool(prob)}


def test_used_boxes_are_where_the_samples_lie(store):
    mapper, rng = make_mapper(store), np.random.default_rng(2)
    for position in range(30):
        made = mapper({"position": position, "sample_ids": quadruple(store, rng)})
        boxes = mapper.used_boxes(position, made["sample_ids"].tolist())
        outside = np.ones((224, 224), bool)
        for (x0, y0, x1, y1), (left, top, right, bottom) in zip(boxes, mapper.template.boxes):
            outside[y0:y1, x0:x1] = False
            # Centred: what is missing on either side differs by an odd pixel at most.
            assert 0 <= (right - x1) - (x0 - left) <= 1 and 0 <= (bottom - y1) - (y0 - top) <= 1
            # The generated samples are nowhere black over a whole rectangle.
            assert made["image"][:, y0:y1, x0:x1].any()
        assert not made["image"].numpy()[:, outside].any()


def test_without_context_the_annotated_box_alone_is_shown(store):
    windows = annotated_windows(store)
    # make_store leaves a fifth of context on each side of a positive, none on a background
    for i in (0, 1, 2):
        height, width = store.sizes[i].tolist()
        inset_x, inset_y = width // 5, height // 5
        assert windows[i].tolist() == [inset_x, inset_y, width - inset_x, height - inset_y]
    background = int(np.flatnonzero(store.classes == len(store.categories))[0])
    assert windows[background].tolist() == [0, 0, *store.sizes[background][::-1].tolist()]

    mapper = make_mapper(store, context=False, scale_range=(1, 1), flip_prob=0)
    record = {"position": 0, "sample_ids": np.array([0, 3, 1, 2])}
    ids = mapper(record)["sample_ids"].tolist()
    boxes = mapper.used_boxes(0, ids)
    for i, (x0, y0, x1, y1), (left, top, right, bottom) in zip(ids, boxes, mapper.template.boxes):
        height, width = mapper.shown_sizes()[0][i].tolist()
        assert (x1 - x0, y1 - y0) == (min(width, right - left), min(height, bottom - top))


def test_bgr_is_rgb_backwards(store):
    record = {"position": 3, "sample_ids": np.array([0, 3, 1, 2])}
    rgb = make_mapper(store)(record)["image"]
    assert torch.equal(make_mapper(store, image_format="BGR")(record)["image"], rgb.flip(0))


@pytest.mark.parametrize("method", ["warp", "resize"])
def test_other_methods_fill_their_regions(store, method):
    mapper = make_mapper(store, method=method)
    made = mapper({"position": 0, "sample_ids": np.array([0, 3, 1, 2])})
    boxes = mapper.used_boxes(0, made["sample_ids"].tolist())
    full = boxes[:, 2:] - boxes[:, :2] == [[64, 64], [160, 64], [64, 160], [160, 160]]
    assert full.any(axis=1).all() and (method == "resize" or full.all())


def test_a_group_of_damaged_samples_is_an_error_that_says_so(tmp_path):
    store = make_store(tmp_path / "store", n_per_group=3)
    record = {"position": 0, "sample_ids": np.array([0, 3, 1, 2])}
    flip(store, 1)
    with pytest.raises(DamagedSampleError, match=r"shard-00000\.tar.*CRC"):
        make_mapper(store)(record)
    flip(store, 4)
    with pytest.raises(DamagedSampleError, match="whole group.*first of 2"):
        make_mapper(store)({**record, "replacements": lambda slot: [4]})


def test_from_config(store):
    cfg = get_jigsaw_cfg(
        overrides=[
            *("INPUT.JIGSAW.TEMPLATE_SIZE", [320, 320], "INPUT.JIGSAW.FIT", "warp"),
            *("INPUT.JIGSAW.SCALE_RANGE", [0.5, 0.6], "INPUT.FORMAT", "BGR", "SEED", 7),
        ]
    )
    mapper = JigsawDatasetMapper(cfg, store)
    assert (mapper.template, mapper.method) == (JigsawTemplate(320, 320), "warp")
    assert (mapper.image_format, mapper.seed, mapper.scale_range) == ("BGR", 7, (0.5, 0.6))
    assert 0.5 <= mapper.draw_augmentations(0)[0].scale < 0.6


@pytest.mark.parametrize(
    "options, key",
    [
        ({"scale_range": (1.5, 0.8)}, "SCALE_RANGE"),
        ({"scale_range": (0.0, 1.0)}, "SCALE_RANGE"),
        ({"flip_prob": 1.5}, "FLIP_PROB"),
        ({"method": "squeeze"}, "FIT"),
        ({"image_format": "L"}, "INPUT.FORMAT"),
    ],
)
def test_bad_options_name_their_key(store, options, key):
    with pytest.raises(ConfigError, match=key):
        make_mapper(store, **options)

"""Which boxes will be cut from which image: geometry alone, before any image is decoded.

Every image has its own random streams, derived from the seed and the image id, so the plan does not
depend on how the images are shared out between processes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from jigsaw_d2.data.image_reading import probe_image
from jigsaw_d2.data.report import ExtractionLog
from jigsaw_d2.data.samples import clip_boxes, enlarge_boxes, sample_backgrounds
from jigsaw_d2.data.sources import UNKNOWN_CLASS, SourceImage
from jigsaw_d2.io import DataError

# Path -> ((height, width), notes), or DataError with a reason.
Probe = Callable[[str], tuple[tuple[int, int], tuple[str, ...]]]
# Streams of an image's generator: the positives', then one for each round of negatives.
POSITIVES_STREAM, NEGATIVES_STREAM = 0, 1
MAX_ROUNDS = 20
# Sizes that negatives are drawn from: a random part of the positives' sizes.
MAX_SIZES = 16384
# Sizes tried for one negative before an image counts as full; each at 50 places.
SIZES_PER_NEGATIVE = 4


@dataclass
class ImagePlan:
    """What to cut from one image; samples in the order of their serial numbers."""

    image_id: int
    path: str
    size: tuple[int, int]  # (height, width) of the upright image
    boxes: np.ndarray  # float32 (k, 4) XYXY to cut, positives first
    gt_boxes: np.ndarray  # float32 (k, 4) XYXY
    classes: np.ndarray  # int64 (k,)
    forbidden: np.ndarray  # float32 (m, 4): what no negative may touch

    @property
    def pixels(self) -> float:
        """Of all its samples."""
        return float((self.boxes[:, 2:].astype(np.float64) - self.boxes[:, :2]).prod(axis=1).sum())


def image_rng(seed: int, image_id: int, stream: int) -> np.random.Generator:
    """The generator of one image and purpose."""
    return np.random.default_rng([seed, image_id & (2**64 - 1), stream])


def plan_positives(
    image: SourceImage,
    seed: int,
    max_scale: float,
    min_side: float,
    log: ExtractionLog,
    probe: Probe = probe_image,
) -> ImagePlan | None:
    """The plan of an image with its positives; None where it cannot be used, which is logged."""
    size = check_image(image, log, probe)
    if size is None:
        return None
    usable, clipped = check_boxes(image, size, min_side, log)
    gt_boxes = clipped[usable]
    rng = image_rng(seed, image.image_id, POSITIVES_STREAM)
    boxes = enlarge_boxes(gt_boxes, size, rng, max_scale)
    classes = np.array([a.class_index for a in image.annotations], np.int64)[usable]
    if not len(boxes):
        log.add("image_without_positives", image.path)
    annotated = clipped[(clipped[:, 2:] > clipped[:, :2]).all(axis=1)]
    forbidden = np.concatenate([boxes, annotated])
    return ImagePlan(image.image_id, image.path, size, boxes, gt_boxes, classes, forbidden)


def check_image(
    image: SourceImage, log: ExtractionLog, probe: Probe = probe_image
) -> tuple[int, int] | None:
    """(height, width) of the image as it will be read; None where it cannot be, which is logged."""
    try:
        size, notes = probe(image.path)
    except DataError as error:
        log.add(str(error), image.path)
        return None
    if image.size is not None and tuple(image.size) != size:
        log.add("image_size_differs", f"{image.path}: json {image.size}, file {size}")
        return None
    for note in notes:
        log.add(note, image.path)
    return size


def check_boxes(
    image: SourceImage,
    size: tuple[int, int],
    min_side: float,
    log: ExtractionLog,
    crowds: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Which annotations are objects; the others are logged, each with one reason.

    Args:
        size: (height, width) of ``check_image``.
        min_side: of the clipped box, pixels.
        crowds: keep crowds.

    Returns:
        (usable, clipped): bool (m,), and the boxes (m, 4) clipped to the image of ``size``, those
        without any area in it as zeros.
    """
    raw = np.array([a.box for a in image.annotations], np.float32).reshape(-1, 4)
    finite = np.isfinite(raw).all(axis=1)
    boxes = np.where(finite[:, None], raw, np.float32(0))
    has_area = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    clipped = clip_boxes(boxes, size)
    sides = clipped[:, 2:] - clipped[:, :2]
    inside = (sides > 0).all(axis=1)
    clipped[~(has_area & inside)] = 0
    # The first that holds names the annotation's reason.
    rejections = {
        "box_not_finite": ~finite,
        "box_without_area": ~has_area,
        "box_outside_image": ~inside,
        "annotation_of_unknown_category": np.array(
            [a.class_index == UNKNOWN_CLASS for a in image.annotations], bool
        ),
        "crowd": np.array([a.crowd and not crowds for a in image.annotations], bool),
        "box_too_small": (sides < min_side).any(axis=1),
    }
    usable = ~np.logical_or.reduce(list(rejections.values()))
    # Half a pixel beyond the border is rounding of the annotation tool, not a fault of the box.
    beyond = (np.abs(boxes - clip_boxes(boxes, size)) > 0.5).any(axis=1)
    for n in np.flatnonzero(~usable | beyond):
        reason = next((name for name, rejected in rejections.items() if rejected[n]), "box_clipped")
        numbers = ", ".join(f"{value:g}" for value in image.annotations[n].box)
        log.add(reason, f"{image.path}: box [{numbers}]")
    return usable, clipped


def add_negatives(
    plans: list[ImagePlan], wanted: int, background: int, seed: int, log: ExtractionLog
) -> list[ImagePlan]:
    """The plans with ``wanted`` negatives placed, as far as there is room.

    Each image is asked for an even share; what finds no place is asked of the others, in rounds.
    """
    sizes = choose_sizes(plans, seed)
    placed: list[list[np.ndarray]] = [[] for _ in plans]
    eligible, missing = list(range(len(plans))), wanted
    for round_number in range(MAX_ROUNDS):
        if missing == 0 or not eligible:
            break
        quotas = split_negatives(missing, len(eligible), [seed, round_number])
        full = set()
        for n, quota in zip(eligible, quotas.tolist()):
            if quota:
                rng = image_rng(seed, plans[n].image_id, NEGATIVES_STREAM + round_number)
                placed[n].append(place_negatives(plans[n], quota, sizes, rng))
                missing -= len(placed[n][-1])
                if len(placed[n][-1]) < quota:
                    full.add(n)
                    log.add("image_without_room", plans[n].path)
        eligible = [n for n in eligible if n not in full]
    return [
        replace(
            plan,
            boxes=np.concatenate([plan.boxes, *boxes]),
            gt_boxes=np.concatenate([plan.gt_boxes, *boxes]),
            classes=np.append(plan.classes, [background] * sum(map(len, boxes))).astype(np.int64),
        )
        for plan, boxes in zip(plans, placed)
    ]


def choose_sizes(plans: list[ImagePlan], seed: int) -> np.ndarray:
    """float32 (n, 2) (width, height) of at most ``MAX_SIZES`` positives, evenly over the plans."""
    boxes = np.concatenate([np.zeros((0, 4), np.float32), *(plan.boxes for plan in plans)])
    sizes = boxes[:, 2:] - boxes[:, :2]
    if len(sizes) > MAX_SIZES:
        sizes = np.random.default_rng(seed).choice(sizes, MAX_SIZES, replace=False, shuffle=False)
    return sizes


def split_negatives(count: int, images: int, seed: int | list[int]) -> np.ndarray:
    """int64 (images,): negatives that each image is asked for; even shares, the rest at random."""
    quotas = np.full(images, count // images, np.int64)
    quotas[np.random.default_rng(seed).permutation(images)[: count % images]] += 1
    return quotas


def place_negatives(
    plan: ImagePlan, quota: int, sizes: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Boxes of up to ``quota`` negatives, float32 (n, 4), of sizes drawn from ``sizes`` (m, 2)."""
    found = np.zeros((0, 4), np.float32)
    for sizes_each in (1, SIZES_PER_NEGATIVE - 1):
        wanted = sizes[rng.integers(0, len(sizes), sizes_each * (quota - len(found)))]
        more = sample_backgrounds(plan.forbidden, plan.size, wanted, rng)
        found = np.concatenate([found, more])[:quota]
    return found


def take_part(plans: list[ImagePlan], part: tuple[int, int]) -> list[ImagePlan]:
    """The i-th of n consecutive pieces of about as many samples each; empty plans are left out."""
    plans = [plan for plan in plans if len(plan.boxes)]
    ends = np.cumsum([len(plan.boxes) for plan in plans])
    number, parts = part
    low, high = (ends[-1] * (number - 1) / parts, ends[-1] * number / parts)
    return [plan for plan, end in zip(plans, ends) if low < end <= high]

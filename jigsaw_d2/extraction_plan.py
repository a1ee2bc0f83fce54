"""Which boxes will be cut from which image: geometry alone, before any image is decoded.

Every image has its own random streams, derived from the seed and the image id, so the plan does not
depend on how the images are shared out between processes.
"""

from dataclasses import dataclass

import numpy as np

from jigsaw_d2.extraction_log import ExtractionLog
from jigsaw_d2.extraction_sources import UNKNOWN_CLASS, SourceImage
from jigsaw_d2.image_reading import ImageReadError, probe_image
from jigsaw_d2.samples import clip_boxes, enlarge_boxes

POSITIVES_STREAM = 0


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
    plain: str = ""  # see image_reading.ImageInfo

    def with_negatives(self, boxes: np.ndarray, background: int) -> "ImagePlan":
        """The plan with the negatives ``boxes`` (n, 4) behind what it has."""
        return ImagePlan(
            self.image_id,
            self.path,
            self.size,
            np.concatenate([self.boxes, boxes]),
            np.concatenate([self.gt_boxes, boxes]),
            np.concatenate([self.classes, np.full(len(boxes), background, np.int64)]),
            self.forbidden,
            self.plain,
        )


def image_rng(seed: int, image_id: int, stream: int) -> np.random.Generator:
    """The generator of one image and purpose."""
    return np.random.default_rng([seed, image_id & (2**64 - 1), stream])


def plan_positives(
    images: list[SourceImage], *, seed: int, max_scale: float, min_side: float, log: ExtractionLog
) -> list[ImagePlan]:
    """One plan for every usable image, with its positives; unusable images and boxes are logged."""
    plans = []
    for image in images:
        try:
            info = probe_image(image.path)
        except ImageReadError as error:
            log.add(error.reason, image.path)
            continue
        if image.size is not None and tuple(image.size) != info.size:
            log.add("image_size_differs", f"{image.path}: json {image.size}, file {info.size}")
            continue
        for note in info.notes:
            log.add(note, image.path)
        usable, forbidden = check_boxes(image, info.size, min_side, log)
        gt_boxes = forbidden[usable]
        rng = image_rng(seed, image.image_id, POSITIVES_STREAM)
        boxes = enlarge_boxes(gt_boxes, info.size, rng, max_scale)
        classes = np.array(image.classes, np.int64)[usable]
        if not len(boxes):
            log.add("image_without_positives", image.path)
        forbidden = np.concatenate([boxes, forbidden[(forbidden[:, 2:] > forbidden[:, :2]).all(1)]])
        where = (image.image_id, image.path, info.size)
        plans.append(ImagePlan(*where, boxes, gt_boxes, classes, forbidden, info.plain))
    return plans


def check_boxes(
    image: SourceImage, size: tuple[int, int], min_side: float, log: ExtractionLog
) -> tuple[np.ndarray, np.ndarray]:
    """(usable, clipped): which annotations become positives, bool (m,), and all boxes (m, 4)
    clipped to the image, those without any area in it as zeros."""
    boxes = np.array(image.boxes, np.float32).reshape(-1, 4)
    height, width = size
    finite = np.isfinite(boxes).all(axis=1)
    boxes = np.where(finite[:, None], boxes, 0)
    has_area = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    clipped = clip_boxes(boxes, size)
    sides = clipped[:, 2:] - clipped[:, :2]
    inside = (sides > 0).all(axis=1)
    clipped[~(has_area & inside)] = 0
    crowd = np.array(image.crowds, bool)
    known = np.array(image.classes, np.int64) != UNKNOWN_CLASS
    small = (sides < min_side).any(axis=1)
    # The first that holds names the annotation's reason.
    rejections = {
        "box_not_finite": ~finite,
        "box_without_area": ~has_area,
        "box_outside_image": ~inside,
        "annotation_of_unknown_category": ~known,
        "crowd": crowd,
        "box_too_small": small,
    }
    usable = ~np.logical_or.reduce(list(rejections.values()))
    for n in np.flatnonzero(~usable):
        reason = next(reason for reason, rejected in rejections.items() if rejected[n])
        log.add(reason, f"{image.path}: box {boxes_text(image.boxes[n])}")
    # Half a pixel beyond the border is rounding of the annotation tool, not a fault of the box.
    beyond = (boxes < -0.5).any(axis=1) | (boxes[:, 2:] > np.array([width, height]) + 0.5).any(
        axis=1
    )
    for n in np.flatnonzero(usable & beyond):
        log.add("box_clipped", f"{image.path}: box {boxes_text(image.boxes[n])}")
    return usable, clipped


def boxes_text(box: list[float]) -> str:
    """XYXY in a log line."""
    return "[" + ", ".join(f"{value:g}" for value in box) + "]"


def chunked(items: list | np.ndarray, size: int) -> list:
    """``items``, of length or shape (n, ...), in pieces of ``size``, the last one shorter."""
    return [items[n : n + size] for n in range(0, len(items), size)]


def take_part(plans: list[ImagePlan], part: tuple[int, int]) -> list[ImagePlan]:
    """The i-th of n consecutive pieces of about as many samples each; empty plans are left out."""
    plans = [plan for plan in plans if len(plan.boxes)]
    ends = np.cumsum([len(plan.boxes) for plan in plans])
    number, parts = part
    low, high = (ends[-1] * (number - 1) / parts, ends[-1] * number / parts)
    return [plan for plan, end in zip(plans, ends) if low < end <= high]

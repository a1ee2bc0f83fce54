"""Which boxes will be cut from which image: geometry alone, before any image is decoded.

Every image has its own random streams, derived from the seed and the image id, so the plan does not
depend on how the images are shared out between processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jigsaw_d2.extraction.image_reading import ImageInfo, ImageReadError, probe_image
from jigsaw_d2.extraction.log import ExtractionLog
from jigsaw_d2.extraction.sources import UNKNOWN_CLASS, SourceImage
from jigsaw_d2.data.samples import enlarge_by, split_rows

# Images that are planned at a time: 40 us each, about what it takes to hand one to another process
# and its plan back.
PLAN_CHUNK = 1024
POSITIVES_STREAM = 0
# Of an image's boxes, gt_boxes, classes, forbidden.
PLAN_DTYPES = (np.float32, np.float32, np.int64, np.float32)


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

    def __reduce__(self) -> tuple:
        """Pickled as bytes, in a third of the time that four arrays of a few rows take."""
        arrays = (self.boxes, self.gt_boxes, self.classes, self.forbidden)
        where = (self.image_id, self.path, self.size)
        return _unpickle_plan, (*where, [array.tobytes() for array in arrays], self.plain)

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


def _unpickle_plan(
    image_id: int, path: str, size: tuple[int, int], arrays: list[bytes], plain: str
) -> ImagePlan:
    boxes, gt_boxes, classes, forbidden = map(np.frombuffer, arrays, PLAN_DTYPES)
    corners = boxes.reshape(-1, 4), gt_boxes.reshape(-1, 4)
    return ImagePlan(image_id, path, size, *corners, classes, forbidden.reshape(-1, 4), plain)


def image_rng(seed: int, image_id: int, stream: int) -> np.random.Generator:
    """The generator of one image and purpose."""
    return np.random.default_rng([seed, image_id & (2**64 - 1), stream])


def plan_positives(
    images: list[SourceImage], *, seed: int, max_scale: float, min_side: float, log: ExtractionLog
) -> list[ImagePlan]:
    """One plan for every usable image, with its positives; unusable images and boxes are logged."""
    found = [(image, info) for image in images if (info := _probe(image, log)) is not None]
    if not found:
        return []
    images, infos = zip(*found)
    sizes = [info.size for info in infos]
    usable, clipped = check_boxes(images, sizes, min_side, log)
    # Arithmetic for all images at once, because it is much faster; only the draws are each its own.
    owners = np.arange(len(images)).repeat([len(image.boxes) for image in images])
    draws = [
        image_rng(seed, image.image_id, POSITIVES_STREAM).random((count, 2, 2))
        for image, count in zip(images, np.bincount(owners[usable], minlength=len(images)))
    ]
    limits = np.array(sizes)[owners[usable]]
    enlarged = enlarge_by(np.concatenate(draws), clipped[usable], limits, max_scale)
    classes = np.array([index for image in images for index in image.classes], np.int64)
    has_area = (clipped[:, 2:] > clipped[:, :2]).all(axis=1)
    columns = [
        split_rows(rows, owners[chosen], len(images))
        for rows, chosen in (
            (enlarged, usable),
            (clipped[usable], usable),
            (classes[usable], usable),
            (clipped[has_area], has_area),
        )
    ]
    plans = []
    for image, info, boxes, gt_boxes, indices, taken in zip(images, infos, *columns):
        if not len(boxes):
            log.add("image_without_positives", image.path)
        where, forbidden = (image.image_id, image.path, info.size), np.concatenate([boxes, taken])
        plans.append(ImagePlan(*where, boxes, gt_boxes, indices, forbidden, info.plain))
    return plans


def _probe(image: SourceImage, log: ExtractionLog) -> ImageInfo | None:
    """What the file's header says; None where the image cannot be used."""
    try:
        info = probe_image(image.path)
    except ImageReadError as error:
        log.add(error.reason, image.path)
        return None
    if image.size is not None and tuple(image.size) != info.size:
        log.add("image_size_differs", f"{image.path}: json {image.size}, file {info.size}")
        return None
    for note in info.notes:
        log.add(note, image.path)
    return info


def check_boxes(
    images: Sequence[SourceImage],
    sizes: Sequence[tuple[int, int]],
    min_side: float,
    log: ExtractionLog,
) -> tuple[np.ndarray, np.ndarray]:
    """Which annotations become positives; those of all images at once, because it is much faster.

    Args:
        sizes: (height, width) of each image.

    Returns:
        (usable, clipped): bool (m,), and the boxes (m, 4) clipped to their images, those without
        any area in them as zeros; image after image.
    """
    counts = [len(image.boxes) for image in images]
    raw = [box for image in images for box in image.boxes]
    limits = np.array(sizes, np.float32).reshape(-1, 2)[:, [1, 0, 1, 0]].repeat(counts, axis=0)
    boxes = np.array(raw, np.float32).reshape(-1, 4)
    finite = np.isfinite(boxes).all(axis=1)
    boxes = np.where(finite[:, None], boxes, np.float32(0))
    has_area = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    clipped = np.clip(boxes, 0, limits)
    sides = clipped[:, 2:] - clipped[:, :2]
    inside = (sides > 0).all(axis=1)
    clipped[~(has_area & inside)] = 0
    classes = np.array([index for image in images for index in image.classes], np.int64)
    # The first that holds names the annotation's reason.
    rejections = {
        "box_not_finite": ~finite,
        "box_without_area": ~has_area,
        "box_outside_image": ~inside,
        "annotation_of_unknown_category": classes == UNKNOWN_CLASS,
        "crowd": np.array([crowd for image in images for crowd in image.crowds], bool),
        "box_too_small": (sides < min_side).any(axis=1),
    }
    usable = ~np.logical_or.reduce(list(rejections.values()))
    # Half a pixel beyond the border is rounding of the annotation tool, not a fault of the box.
    beyond = ((boxes < -0.5) | (boxes > limits + 0.5)).any(axis=1)
    owners = np.arange(len(images)).repeat(counts)
    for n in np.flatnonzero(~usable | beyond):
        reason = next((name for name, rejected in rejections.items() if rejected[n]), "box_clipped")
        log.add(reason, f"{images[owners[n]].path}: box {boxes_text(raw[n])}")
    return usable, clipped


def boxes_text(box: list[float]) -> str:
    """XYXY in a log line."""
    return "[" + ", ".join(f"{value:g}" for value in box) + "]"


def chunked(images: list | np.ndarray) -> list:
    """``images``, of length or shape (n, ...), in pieces of ``PLAN_CHUNK``, the last one shorter.

    How they are cut up does not show in the plans.
    """
    return [images[n : n + PLAN_CHUNK] for n in range(0, len(images), PLAN_CHUNK)]


def take_part(plans: list[ImagePlan], part: tuple[int, int]) -> list[ImagePlan]:
    """The i-th of n consecutive pieces of about as many samples each; empty plans are left out."""
    plans = [plan for plan in plans if len(plan.boxes)]
    ends = np.cumsum([len(plan.boxes) for plan in plans])
    number, parts = part
    low, high = (ends[-1] * (number - 1) / parts, ends[-1] * number / parts)
    return [plan for plan, end in zip(plans, ends) if low < end <= high]

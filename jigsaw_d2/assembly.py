"""One sample into its region: resize, flip, crop or pad; and four regions into one image.

Pure: no config, no files. What is drawn at random (``Augmentation``) is kept apart from what
follows from it (``Placement``) and from the pixels (``paint``), so that a caller knows which window
of a sample will be seen before it decodes any of it.

Sizes are (height, width). "Sample pixels" are those of the stored sample; "resized pixels" those
after resizing and flipping; "region pixels" begin at the region's corner.
"""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from jigsaw_d2.template import JigsawTemplate

METHODS = ("pad_crop", "warp", "resize")


class Augmentation(NamedTuple):
    """What is drawn at random for one sample, before its size or region is known."""

    scale: float = 1.0  # ratio that resizes both sides (Sec. 4.1: 0.8 to 1.5)
    flip: bool = False  # mirror left and right
    crop_y: float = 0.5  # in [0, 1): which of the possible crop positions, first to last
    crop_x: float = 0.5


class Placement(NamedTuple):
    """Where each shown pixel of one sample comes from and goes to."""

    resized: tuple[int, int]  # (height, width) of the whole sample after resizing
    crop: tuple[int, int]  # (y, x) in resized pixels of the first one shown
    paste: tuple[int, int]  # (y, x) in region pixels where it goes
    shown: tuple[int, int]  # (height, width) of the part shown
    flip: bool


def place_sample(
    size: tuple[int, int],
    region: tuple[int, int],
    method: str,
    augmentation: Augmentation,
) -> Placement:
    """Lay a sample into a region (Sec. 3.2 and appendix A, P2.4-P2.6).

    "pad_crop" resizes by the drawn ratio, crops what exceeds the region at a uniformly drawn
    position and centres what is smaller. "warp" stretches the sample to the region; "resize"
    keeps its aspect, the longer side (relative to the region) filling it. Both end at a size that
    the region alone dictates, so the drawn ratio has no effect on them.

    Args:
        size: of the sample, each side >= 1.
        region: of the region.
    """
    height, width = size
    if method == "pad_crop":
        ratio_y = ratio_x = augmentation.scale
    elif method == "warp":
        ratio_y, ratio_x = region[0] / height, region[1] / width
    elif method == "resize":
        ratio_y = ratio_x = min(region[0] / height, region[1] / width)
    else:
        raise ValueError(f"fit method {method!r}: use one of {', '.join(METHODS)}")
    resized_y = max(1, int(height * ratio_y + 0.5))
    resized_x = max(1, int(width * ratio_x + 0.5))
    crop_y, paste_y, shown_y = _place_axis(resized_y, region[0], augmentation.crop_y)
    crop_x, paste_x, shown_x = _place_axis(resized_x, region[1], augmentation.crop_x)
    return Placement(
        (resized_y, resized_x),
        (crop_y, crop_x),
        (paste_y, paste_x),
        (shown_y, shown_x),
        augmentation.flip,
    )


def _place_axis(resized: int, region: int, draw: float) -> tuple[int, int, int]:
    """(crop start, paste start, length) along one axis; an odd padding pixel goes behind."""
    if resized > region:
        return int(draw * (resized - region + 1)), 0, region
    return 0, (region - resized) // 2, resized


def source_window(placement: Placement, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """XYXY sample pixels that bilinear interpolation of the shown part reads.

    Args:
        size: of the sample for which ``placement`` was made.
    """
    y0, y1 = _source_span(placement.crop[0], placement.shown[0], placement.resized[0], size[0])
    start = unflipped_start(placement)
    x0, x1 = _source_span(start, placement.shown[1], placement.resized[1], size[1])
    return x0, y0, x1, y1


def unflipped_start(placement: Placement) -> int:
    """First shown column in pixels of the resized sample before its flip."""
    if placement.flip:
        return placement.resized[1] - placement.crop[1] - placement.shown[1]
    return placement.crop[1]


def _source_span(start: int, length: int, resized: int, size: int) -> tuple[int, int]:
    """[first, last) pixels read for resized pixels [start, start + length) of ``resized``.

    Pixel centres lie at + 0.5: resized pixel j reads position (j + 0.5) * size / resized - 0.5.
    """
    if size == resized:
        return start, start + length
    step = size / resized
    first = int(max((start + 0.5) * step - 0.5, 0.0))
    last = int((start + length - 0.5) * step - 0.5) + 2
    return first, min(last, size)


def paint(
    source: np.ndarray,
    window: tuple[int, int, int, int],
    size: tuple[int, int],
    placement: Placement,
    out: np.ndarray,
) -> None:
    """Draw the shown part into a region; padding stays as ``out`` has it.

    Equal, to the rounding of one level, to resizing the whole sample with ``cv2.resize``
    (INTER_LINEAR), flipping it, and cropping.

    Args:
        source: uint8 (h, w, 3), the sample's pixels inside ``window``.
        window: XYXY sample pixels, at least ``source_window(placement, size)``.
        size: of the sample.
        out: uint8 (region height, region width, 3), zeros where the sample will not reach.
    """
    (top, left), (height, width) = placement.paste, placement.shown
    target = out[top : top + height, left : left + width]
    step_y, step_x = size[0] / placement.resized[0], size[1] / placement.resized[1]
    start_y = (placement.crop[0] + 0.5) * step_y - 0.5 - window[1]
    start_x = (unflipped_start(placement) + 0.5) * step_x - 0.5 - window[0]
    if placement.flip:
        start_x, step_x = start_x + (width - 1) * step_x, -step_x
    matrix = np.array([[step_x, 0, start_x], [0, step_y, start_y]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    cv2.warpAffine(source, matrix, (width, height), target, flags, cv2.BORDER_REPLICATE)


def fit_to_region(
    image: np.ndarray, size: tuple[int, int], method: str, rng: np.random.Generator
) -> np.ndarray:
    """A whole sample in its region, without augmentation; ``rng`` places the crop.

    Args:
        image: uint8 (h, w, 3).
        size: (height, width) of the region.
        method: "pad_crop", "warp" or "resize".

    Returns:
        uint8 (height, width, 3); padding is 0, that is black before normalisation.
    """
    crop_y, crop_x = rng.random(2)
    image_size = image.shape[:2]
    placement = place_sample(image_size, size, method, Augmentation(1.0, False, crop_y, crop_x))
    out = np.zeros((*size, 3), np.uint8)
    paint(image, (0, 0, image_size[1], image_size[0]), image_size, placement, out)
    return out


def assemble(
    images: Sequence[np.ndarray],
    template: JigsawTemplate,
    method: str,
    rng: np.random.Generator,
) -> np.ndarray:
    """Stitch four samples, already in region order R1..R4, into uint8 (H, W, 3)."""
    canvas = np.zeros((template.height, template.width, 3), np.uint8)
    for image, (x0, y0, x1, y1) in zip(images, template.boxes, strict=True):
        canvas[y0:y1, x0:x1] = fit_to_region(image, (y1 - y0, x1 - x0), method, rng)
    return canvas

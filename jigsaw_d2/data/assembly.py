"""One sample into its region: resize, flip, crop or pad; and four regions into one image.

Pure: no config, no files. What is drawn at random (``Augmentation``) is kept apart from what
follows from it (``Placement``) and from the pixels (``paint``), so that a caller knows which window
of a sample will be seen before it decodes any of it.

Sizes are (height, width). "Sample pixels" are those of the stored sample; "resized pixels" those
after resizing, before flipping; "region pixels" begin at the region's corner.
"""

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

import cv2
import numpy as np

from jigsaw_d2.data.template import JigsawTemplate

METHODS = ("pad_crop", "warp", "resize")


class Augmentation(NamedTuple):
    """What is drawn at random for one sample, before its size or region is known."""

    scale: float = 1.0  # ratio that resizes both sides (Sec. 4.1: 0.8 to 1.5)
    flip: bool = False  # mirror left and right
    crop_y: float = 0.5  # in [0, 1): which of the possible crop positions, first to last
    crop_x: float = 0.5


class AxisPlacement(NamedTuple):
    """One axis of a sample's way into its region."""

    resized: int  # length of the whole sample after resizing
    step: float  # sample pixels per resized pixel
    crop: int  # first resized pixel that is shown
    shown: int  # how many are
    paste: int  # region pixel where the first one goes
    anchor: int  # resized pixel, at or before ``crop``, that begins on a whole sample pixel
    first: int  # that sample pixel; [first, last) is all that must be decoded
    last: int


class Placement(NamedTuple):
    """Where each shown pixel of one sample comes from; the flip mirrors what is shown."""

    y: AxisPlacement
    x: AxisPlacement
    flip: bool
    interpolation: int  # of cv2.resize

    @property
    def window(self) -> tuple[int, int, int, int]:
        """XYXY sample pixels that must be decoded."""
        return self.x.first, self.y.first, self.x.last, self.y.last


def place_sample(
    size: tuple[int, int], region: tuple[int, int], method: str, augmentation: Augmentation
) -> Placement:
    """Lay a sample of ``size``, each side >= 1, into a region (Sec. 3.2, appendix A, P2.4-P2.6).

    "pad_crop" resizes by the drawn ratio, crops what exceeds the region at a uniformly drawn
    position and centres what is smaller. "warp" stretches the sample to the region; "resize"
    keeps its aspect, the longer side (relative to the region) filling it: on both the drawn ratio
    has no effect.
    """
    (height, width), flip = size, augmentation.flip
    if method == "pad_crop":
        scale = augmentation.scale
        y = _crop_axis(height, max(1, round(height * scale)), region[0], augmentation.crop_y)
        x = _crop_axis(width, max(1, round(width * scale)), region[1], augmentation.crop_x)
        return Placement(y, x, flip, cv2.INTER_LINEAR)
    if method == "warp":
        fitted = region
    elif method == "resize":
        ratio = min(region[0] / height, region[1] / width)
        fitted = (max(1, round(height * ratio)), max(1, round(width * ratio)))
    else:
        raise ValueError(f"fit method {method!r}: use one of {', '.join(METHODS)}")
    y, x = _whole_axis(height, fitted[0], region[0]), _whole_axis(width, fitted[1], region[1])
    # A large sample shrinks to fit by any factor: averaging areas keeps it free of aliasing.
    shrinks = y.step >= 1 and x.step >= 1
    return Placement(y, x, flip, cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def _whole_axis(size: int, resized: int, region: int) -> AxisPlacement:
    """All of the sample shown, in the middle; an odd padding pixel goes behind."""
    paste = (region - resized) // 2
    return AxisPlacement(resized, size / resized, 0, resized, paste, 0, 0, size)


def _crop_axis(size: int, resized: int, region: int, draw: float) -> AxisPlacement:
    """As ``_whole_axis`` where the resized sample fits, else a crop at position ``draw``.

    ``cv2.resize`` always begins on a whole pixel, a crop of a resized sample in general between
    two. So the step is adjusted within the rounding that resizing to whole pixels has anyway (the
    sample's length stays within half a pixel of ``resized``) until a resized pixel at or shortly
    before the crop begins on a whole sample pixel. From there, resizing a window gives the pixels
    that resizing the whole by the same step gives.
    """
    if resized <= region:
        return _whole_axis(size, resized, region)
    crop = int(draw * (resized - region + 1))
    step, anchor, first = _find_anchor(size, resized, crop)
    # Resized pixel j reads the pixels around (j + 0.5) * step - 0.5: centres lie at + 0.5.
    last = int((crop + region - 0.5) * step - 0.5) + 2
    return AxisPlacement(resized, step, crop, region, 0, anchor, first, min(last, size))


def _find_anchor(size: int, resized: int, crop: int) -> tuple[float, int, int]:
    """(step, anchor, first) of ``AxisPlacement``; (size / resized, 0, 0) where none is nearer."""
    step = size / resized
    # Enlarged, the resized pixels at the window's edge would read before it: they are not shown.
    for anchor in range(crop - max(0, ceil(0.5 / step - 0.5)), 0, -1):
        first = int(anchor * step + 0.5)
        # 0.45: clear of a tie, in which rounding errors would decide the length.
        bound = 0.45 * first
        if -bound <= size * anchor - resized * first <= bound:
            return first / anchor, anchor, first
    return step, 0, 0


def paint(source: np.ndarray, placement: Placement, out: np.ndarray) -> None:
    """Draw what is shown of a sample into its region; padding stays as ``out`` has it.

    Equal, to the rounding of one level, to resizing the whole sample by ``step`` with
    ``cv2.resize``, cropping, and flipping.

    Args:
        source: uint8 (h, w, 3), the sample's pixels inside ``placement.window``; or of another
            type and number of channels.
        out: uint8 (region height, region width, 3), zeros where the sample will not reach; or, as
            ``source``, of C channels, of uint8 or float32.
    """
    if source.shape[2:] not in ((), (3,)) or source.dtype != out.dtype:
        for channel in range(source.shape[2]):  # OpenCV's functions differ in how many they take
            plane = np.ascontiguousarray(source[..., channel], out.dtype)
            drawn = np.ascontiguousarray(out[..., channel])
            paint(plane, placement, drawn)
            out[..., channel] = drawn
        return
    y, x, flip, interpolation = placement
    target = out[y.paste : y.paste + y.shown, x.paste : x.paste + x.shown]
    if y.shown == y.resized and x.shown == x.resized and not flip:
        cv2.resize(source, (x.shown, y.shown), target, 0, 0, interpolation)
        return
    if y.step != 1 or x.step != 1:
        source = _resize_by(source, y.step, x.step, interpolation)
    top, left = y.crop - y.anchor, x.crop - x.anchor
    shown = source[top : top + y.shown, left : left + x.shown]
    if flip:
        cv2.flip(shown, 1, target)
    else:
        target[:] = shown


def _resize_by(source: np.ndarray, step_y: float, step_x: float, interpolation: int) -> np.ndarray:
    """Resized pixel (j, i) shows ((j + 0.5) * step_y - 0.5, (i + 0.5) * step_x - 0.5)."""
    height, width = source.shape[:2]
    size = round(width / step_x), round(height / step_y)
    if size != (width, height):
        return cv2.resize(source, None, None, 1 / step_x, 1 / step_y, interpolation)
    # cv2.resize copies where the size does not change, though the step is not quite 1.
    matrix = np.array([[step_x, 0, 0.5 * step_x - 0.5], [0, step_y, 0.5 * step_y - 0.5]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(source, matrix, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)


def fit_to_region(
    image: np.ndarray, size: tuple[int, int], method: str, rng: np.random.Generator
) -> np.ndarray:
    """A whole sample in its region, without augmentation; ``rng`` places the crop.

    Args:
        image: uint8 (h, w, 3).
        method: "pad_crop", "warp" or "resize".

    Returns:
        uint8 (*size, 3); padding is 0, that is black before normalisation.
    """
    crop_y, crop_x = rng.random(2)
    image_size = image.shape[:2]
    placement = place_sample(image_size, size, method, Augmentation(1.0, False, crop_y, crop_x))
    x0, y0, x1, y1 = placement.window
    out = np.zeros((*size, 3), np.uint8)
    paint(image[y0:y1, x0:x1], placement, out)
    return out


def assemble(
    images: Sequence[np.ndarray], template: JigsawTemplate, method: str, rng: np.random.Generator
) -> np.ndarray:
    """Stitch four samples, already in region order R1..R4, into uint8 (H, W, 3)."""
    canvas = np.zeros((template.height, template.width, 3), np.uint8)
    for image, (x0, y0, x1, y1) in zip(images, template.boxes, strict=True):
        canvas[y0:y1, x0:x1] = fit_to_region(image, (y1 - y0, x1 - x0), method, rng)
    return canvas

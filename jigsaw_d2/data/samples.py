"""Annotated boxes -> boxes of positive and negative samples (Sec. 3.1); pure geometry.

Boxes are XYXY in source pixels, half-open, float32. What is returned is integral: a sample is cut
along pixel edges. Image sizes are (height, width).
"""

import numpy as np

# Sec. 3.2: square-like, tall and wide samples; the order gives the group codes 0, 1, 2.
GROUPS = ("S", "T", "W")
TALL_BELOW = 0.5
WIDE_ABOVE = 1.5


def group_codes(widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """Index into ``GROUPS`` by aspect ratio width / height: T below 0.5, W above 1.5, else S.

    Args: positive numbers of one shape (n,), pixels. Returns uint8 (n,).
    """
    ratios = np.asarray(widths, np.float64) / np.asarray(heights, np.float64)
    return np.where(ratios < TALL_BELOW, 1, np.where(ratios > WIDE_ABOVE, 2, 0)).astype(np.uint8)


def shape_group(width: float, height: float) -> str:
    """ "S", "T" or "W" of one sample of ``width`` x ``height`` pixels (both positive)."""
    return GROUPS[int(group_codes(np.array([width]), np.array([height]))[0])]


def clip_boxes(boxes: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """The parts of ``boxes`` (n, 4) inside the image, float32; empty ones get a side of 0."""
    height, width = image_size
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    return np.clip(boxes, 0, np.array([width, height, width, height], np.float32))


def enlarge_boxes(
    boxes: np.ndarray, image_size: tuple[int, int], rng: np.random.Generator, max_scale: float = 2.0
) -> np.ndarray:
    """Positive samples: each side of a box moves outwards at random, clipped at the image border.

    Each of the four sides moves by an independent uniform draw from [0, (max_scale - 1) / 2] times
    the box's width or height. Edges are whole pixels: the result contains the clipped box, and
    exceeds ``max_scale`` times it only where the whole pixels that the box touches already do.

    Args:
        boxes: (n, 4), each with some area inside the image.
        rng: consumes four draws per box, so boxes one by one give the same as all at once.

    Returns:
        float32 (n, 4), integral.

    Raises:
        ValueError: a box without area inside the image, or ``max_scale`` below 1.
    """
    if not max_scale >= 1:
        raise ValueError(f"max_scale is {max_scale}; a sample is no smaller than its box (>= 1)")
    boxes = clip_boxes(boxes, image_size).astype(np.float64)
    low, high = boxes[:, :2], boxes[:, 2:]
    sides = high - low
    for box in boxes[~(sides > 0).all(axis=1)]:
        raise ValueError(f"box {box.tolist()} has no area inside the image of size {image_size}")
    draws = rng.random((len(boxes), 2, 2))
    reach = sides * (max_scale - 1) / 2
    new_low = np.maximum(np.rint(low - draws[:, 0] * reach), np.ceil(low - reach))
    new_low = np.maximum(np.minimum(new_low, np.floor(low)), 0)
    new_high = np.minimum(
        np.rint(high + draws[:, 1] * reach), np.floor(new_low + max_scale * sides)
    )
    new_high = np.maximum(np.minimum(new_high, np.floor(high + reach)), np.ceil(high))
    return clip_boxes(np.concatenate([new_low, new_high], axis=1), image_size)


def enlarge_box(
    box: np.ndarray, image_size: tuple[int, int], rng: np.random.Generator, max_scale: float = 2.0
) -> np.ndarray:
    """``enlarge_boxes`` for one box (4,) -> float32 (4,)."""
    return enlarge_boxes(np.asarray(box).reshape(1, 4), image_size, rng, max_scale)[0]


def overlaps_any(boxes: np.ndarray, forbidden: np.ndarray) -> np.ndarray:
    """Which of ``boxes`` (n, 4) share any area with one of ``forbidden`` (m, 4); bool (n,)."""
    x0, y0, x1, y1 = np.asarray(boxes).T[..., None]
    left, top, right, bottom = np.asarray(forbidden).T
    hits = (x0 < right) & (left < x1) & (y0 < bottom) & (top < y1)
    return (hits & (left < right) & (top < bottom)).any(axis=1)


def sample_backgrounds(
    forbidden: np.ndarray,
    image_size: tuple[int, int],
    sizes: np.ndarray,
    rng: np.random.Generator,
    max_tries: int = 50,
) -> np.ndarray:
    """Negative samples: boxes of the wanted sizes at random places that touch nothing forbidden.

    Args:
        forbidden: (m, 4) boxes that none may overlap (IoU 0): enlarged positives, all annotations.
        sizes: (k, 2) wanted (width, height) in pixels; one larger than the image finds no place.
        max_tries: random places tried for each size.

    Returns:
        float32 (n, 4), n <= k, integral, in the order of ``sizes``, those without a place left out.
    """
    forbidden = np.asarray(forbidden, np.float32).reshape(-1, 4)
    room = np.array(image_size[::-1], np.float64)
    found = []
    for size in np.maximum(np.rint(np.asarray(sizes, np.float64).reshape(-1, 2)), 1):
        if (size > room).any():
            continue
        corners = np.floor(rng.random((max_tries, 2)) * (room - size + 1))
        places = np.concatenate([corners, corners + size], axis=1).astype(np.float32)
        free = ~overlaps_any(places, forbidden)
        if free.any():
            found.append(places[free.argmax()])
    return np.array(found, np.float32).reshape(-1, 4)

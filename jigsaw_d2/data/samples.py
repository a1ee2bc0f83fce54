"""Annotated boxes -> boxes of positive and negative samples (Sec. 3.1); pure geometry.

Boxes are XYXY in source pixels, half-open, float32. What is returned is integral: a sample is cut
along pixel edges. Image sizes are (height, width).
"""

from collections.abc import Sequence

import numpy as np

# Sec. 3.2: square-like, tall and wide samples; the order gives the group codes 0, 1, 2.
GROUPS = ("S", "T", "W")
TALL_BELOW = 0.5
WIDE_ABOVE = 1.5

# Random places looked at before the others are: most negatives find room among them.
FIRST_TRIES = 8
# Pairs of boxes, about 20 bytes each.
COMPARED_AT_ONCE = 1 << 20


def group_codes(widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """Index into ``GROUPS`` by aspect ratio width / height: T below 0.5, W above 1.5, else S.

    Args:
        widths, heights: positive numbers of one shape (n,), pixels.

    Returns:
        uint8 (n,).
    """
    ratios = np.asarray(widths, np.float64) / np.asarray(heights, np.float64)
    return np.where(ratios < TALL_BELOW, 1, np.where(ratios > WIDE_ABOVE, 2, 0)).astype(np.uint8)


def shape_group(width: float, height: float) -> str:
    """ "S", "T" or "W" of one sample of ``width`` x ``height`` pixels (both positive)."""
    return GROUPS[int(group_codes(np.array([width]), np.array([height]))[0])]


def clip_boxes(boxes: np.ndarray, image_size: tuple[int, int] | np.ndarray) -> np.ndarray:
    """The parts of ``boxes`` (n, 4) inside the image, float32; empty ones get a side of 0.

    ``image_size``: of one image, or of each box's, (n, 2).
    """
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    return np.clip(boxes, 0, np.asarray(image_size, np.float32)[..., [1, 0, 1, 0]])


def enlarge_boxes(
    boxes: np.ndarray,
    image_size: tuple[int, int],
    rng: np.random.Generator,
    max_scale: float = 2.0,
) -> np.ndarray:
    """``enlarge_by`` for boxes (n, 4), each with some area inside one image -> float32 (n, 4).

    Args:
        rng: consumes four draws per box, so boxes one by one give the same as all at once.
    """
    return enlarge_by(rng.random((len(boxes), 2, 2)), boxes, image_size, max_scale)


def enlarge_by(
    draws: np.ndarray,
    boxes: np.ndarray,
    image_size: tuple[int, int] | np.ndarray,
    max_scale: float = 2.0,
) -> np.ndarray:
    """Positive samples: each side of a box moves outwards at random, clipped at the image border.

    Each of the four sides moves by an independent uniform draw from [0, (max_scale - 1) / 2] times
    the box's width or height, so that a side grows to at most ``max_scale`` times its length. Edges
    are whole pixels: the result contains the clipped box, and exceeds ``max_scale`` only where the
    whole pixels that the box touches already do.

    Args:
        draws: (n, 2, 2), uniform from [0, 1): for the sides (left, top), (right, bottom).
        boxes: (n, 4), each with some area inside its image.
        image_size: of one image, or of each box's, (n, 2).

    Returns:
        float32 (n, 4), integral.

    Raises:
        ValueError: a box without area inside its image, or ``max_scale`` below 1.
    """
    if not max_scale >= 1:
        raise ValueError(
            f"max_scale is {max_scale}; a sample cannot be smaller than its box (>= 1)"
        )
    boxes = clip_boxes(boxes, image_size).astype(np.float64)
    low, high = boxes[:, :2], boxes[:, 2:]
    sides = high - low
    without_area = ~(sides > 0).all(axis=1)
    if without_area.any():
        bad = without_area.argmax()
        size = tuple(np.broadcast_to(image_size, (len(boxes), 2))[bad].tolist())
        raise ValueError(f"box {boxes[bad].tolist()} has no area inside the image of size {size}")
    reach = sides * (max_scale - 1) / 2
    new_low = np.maximum(np.rint(low - draws[:, 0] * reach), np.ceil(low - reach))
    new_low = np.maximum(np.minimum(new_low, np.floor(low)), 0)
    new_high = np.minimum(
        np.rint(high + draws[:, 1] * reach), np.floor(new_low + max_scale * sides)
    )
    new_high = np.maximum(np.minimum(new_high, np.floor(high + reach)), np.ceil(high))
    enlarged = np.concatenate([new_low, new_high], axis=1)
    return clip_boxes(enlarged, image_size)


def enlarge_box(
    box: np.ndarray,
    image_size: tuple[int, int],
    rng: np.random.Generator,
    max_scale: float = 2.0,
) -> np.ndarray:
    """``enlarge_boxes`` for one box (4,) -> float32 (4,)."""
    return enlarge_boxes(np.asarray(box).reshape(1, 4), image_size, rng, max_scale)[0]


def overlaps_any(boxes: np.ndarray, forbidden: np.ndarray) -> np.ndarray:
    """Which of ``boxes`` (n, 4) share any area with one of ``forbidden`` (m, 4); bool (n,)."""
    places, owners = np.asarray(boxes)[:, None], np.zeros(len(boxes), np.int64)
    return overlaps_own(places, owners, [np.asarray(forbidden)])[:, 0]


def overlaps_own(
    places: np.ndarray, owners: np.ndarray, forbidden: Sequence[np.ndarray]
) -> np.ndarray:
    """Which boxes share any area with one that is forbidden in their own image.

    Args:
        places: (n, t, 4), t boxes to a row.
        owners: (n,), the image of each row.
        forbidden: (m, 4) for each image.

    Returns:
        bool (n, t).
    """
    others = np.concatenate(forbidden)
    images = np.arange(len(forbidden)).repeat([len(boxes) for boxes in forbidden])
    with_area = (others[:, 2:] > others[:, :2]).all(axis=1)
    others, counts = others[with_area], np.bincount(images[with_area], minlength=len(forbidden))
    starts, pairs = counts.cumsum() - counts, counts[owners]
    taken = np.zeros(places.shape[:2], bool)
    rows = pairs.nonzero()[0]
    # As many rows at once as keep the comparison of each with all its others within memory.
    ends = (pairs[rows] * places.shape[1]).cumsum()
    for part in np.split(rows, np.diff(ends // COMPARED_AT_ONCE).nonzero()[0] + 1):
        if len(part):
            taken[part] = _overlaps_range(places[part], others, starts[owners[part]], pairs[part])
    return taken


def _overlaps_range(
    places: np.ndarray, others: np.ndarray, starts: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """bool (n, t): places (n, t, 4), row i against the counts[i] > 0 others from starts[i] on."""
    firsts = counts.cumsum() - counts
    which = np.arange(counts.sum()) + (starts - firsts).repeat(counts)
    x0, y0, x1, y1 = places.transpose(2, 0, 1).repeat(counts, axis=1)
    left, top, right, bottom = others[which].T[..., None]
    hits = (x0 < right) & (left < x1)
    hits &= y0 < bottom
    hits &= top < y1
    return np.logical_or.reduceat(hits, firsts)


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
    sizes = np.asarray(sizes, np.float64).reshape(-1, 2)
    return sample_backgrounds_of([forbidden], [image_size], [sizes], [rng], max_tries)[0]


def sample_backgrounds_of(
    forbidden: Sequence[np.ndarray],
    image_sizes: Sequence[tuple[int, int]],
    sizes: Sequence[np.ndarray],
    rngs: Sequence[np.random.Generator],
    max_tries: int = 50,
) -> list[np.ndarray]:
    """``sample_backgrounds`` of several images at once, much faster than of one by one.

    Args:
        forbidden, image_sizes, sizes, rngs: an entry for each image: (m, 4), (height, width),
            (k, 2), and what its places alone are drawn from.

    Returns:
        float32 (n, 4) for each image.
    """
    owners = np.arange(len(rngs)).repeat([len(wanted) for wanted in sizes])
    room = np.array(image_sizes, np.float64)[owners, ::-1]
    wanted = np.maximum(np.rint(np.concatenate(sizes).astype(np.float64)), 1)
    fits = (wanted <= room).all(axis=1)
    owners, room, wanted = owners[fits], room[fits], wanted[fits]
    counts = np.bincount(owners, minlength=len(rngs))
    draws = [rng.random((count, max_tries, 2)) for rng, count in zip(rngs, counts)]
    corners = np.floor(np.concatenate(draws) * (room - wanted + 1)[:, None])
    boxes = np.concatenate([corners, corners + wanted[:, None]], axis=2).astype(np.float32)
    free = np.zeros(boxes.shape[:2], bool)
    free[:, :FIRST_TRIES] = ~overlaps_own(boxes[:, :FIRST_TRIES], owners, forbidden)
    rest = ~free.any(axis=1)
    free[rest, FIRST_TRIES:] = ~overlaps_own(boxes[rest, FIRST_TRIES:], owners[rest], forbidden)
    found, first = free.any(axis=1), free.argmax(axis=1)
    return split_rows(boxes[np.arange(len(boxes)), first][found], owners[found], len(rngs))


def split_rows(rows: np.ndarray, owners: np.ndarray, count: int) -> list[np.ndarray]:
    """``rows`` (m, ...) by their ascending ``owners`` (m,): a piece for each of 0 to count - 1."""
    ends = np.bincount(owners, minlength=count).cumsum().tolist()
    return [rows[start:end] for start, end in zip([0, *ends], ends)]

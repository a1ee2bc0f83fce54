"""Where negatives lie: as many as the dataset's ratio asks for, in whichever images have room."""

import numpy as np

from jigsaw_d2.extraction.log import ExtractionLog
from jigsaw_d2.extraction.plan import ImagePlan, chunked, image_rng
from jigsaw_d2.extraction.workers import Workers
from jigsaw_d2.data.samples import sample_backgrounds_of

# Streams of an image's generator from here on, one for each round; 0 is the positives'.
FIRST_STREAM = 1
# Sizes that negatives are drawn from: a random part of the positives' sizes, so that a task stays
# small however many there are.
MAX_SIZES = 16384
# Sizes tried for one negative before an image counts as full; each at 50 places.
SIZES_PER_NEGATIVE = 4
MAX_ROUNDS = 20


def add_negatives(
    plans: list[ImagePlan],
    wanted: int,
    background: int,
    seed: int,
    workers: Workers,
    log: ExtractionLog,
) -> list[ImagePlan]:
    """The plans with ``wanted`` negatives placed, as far as there is room.

    Each image is asked for an even share; what finds no place there is asked of the others, in
    rounds, until all are placed or no image has room.
    """
    sizes = choose_sizes(plans, seed)
    placed: list[list[np.ndarray]] = [[] for _ in plans]
    eligible, missing = np.arange(len(plans)), wanted
    for round_number in range(MAX_ROUNDS):
        if missing == 0 or len(eligible) == 0:
            break
        quotas = split_negatives(missing, len(eligible), [seed, round_number])
        asked = np.flatnonzero(quotas)
        tasks = (
            ([plans[eligible[a]] for a in part], quotas[part].tolist(), sizes, seed, round_number)
            for part in chunked(asked)
        )
        found = [boxes for part in workers.map(_place_chunk, tasks) for boxes in part]
        full = np.zeros(len(eligible), bool)
        for a, boxes in zip(asked, found):
            placed[eligible[a]].append(boxes)
            missing -= len(boxes)
            if len(boxes) < quotas[a]:
                full[a] = True
                log.add("image_without_room", plans[eligible[a]].path)
        eligible = eligible[~full]
    return [
        plan.with_negatives(np.concatenate(boxes), background) if boxes else plan
        for plan, boxes in zip(plans, placed)
    ]


def _place_chunk(
    plans: list[ImagePlan], quotas: list[int], sizes: np.ndarray, seed: int, round_number: int
) -> list[np.ndarray]:
    stream = FIRST_STREAM + round_number
    return place_negatives(plans, quotas, sizes, seed=seed, stream=stream)


def choose_sizes(plans: list[ImagePlan], seed: int) -> np.ndarray:
    """float32 (n, 2) (width, height) of at most ``MAX_SIZES`` positives, evenly over the plans."""
    boxes = (
        np.concatenate([plan.boxes for plan in plans]) if plans else np.zeros((0, 4), np.float32)
    )
    sizes = boxes[:, 2:] - boxes[:, :2]
    if len(sizes) > MAX_SIZES:
        sizes = np.random.default_rng(seed).choice(sizes, MAX_SIZES, replace=False, shuffle=False)
    return sizes


def split_negatives(count: int, images: int, seed: int | list[int]) -> np.ndarray:
    """int64 (images,): negatives that each image is asked for; even shares, the rest at random."""
    quotas = np.full(images, count // max(images, 1), np.int64)
    extra = np.random.default_rng(seed).permutation(images)[: count - quotas.sum()]
    quotas[extra] += 1
    return quotas


def place_negatives(
    plans: list[ImagePlan], quotas: list[int], sizes: np.ndarray, *, seed: int, stream: int
) -> list[np.ndarray]:
    """Boxes of up to ``quotas[i]`` negatives for each plan, float32 (n_i, 4), of random sizes."""
    rngs = [image_rng(seed, plan.image_id, stream) for plan in plans]
    found = _try_sizes(plans, quotas, sizes, rngs)
    missing = [quota - len(boxes) for quota, boxes in zip(quotas, found)]
    again = [n for n, count in enumerate(missing) if count]
    if again:
        others = [(SIZES_PER_NEGATIVE - 1) * missing[n] for n in again]
        more = _try_sizes([plans[n] for n in again], others, sizes, [rngs[n] for n in again])
        for n, boxes in zip(again, more):
            found[n] = np.concatenate([found[n], boxes])[: quotas[n]]
    return found


def _try_sizes(
    plans: list[ImagePlan], counts: list[int], sizes: np.ndarray, rngs: list[np.random.Generator]
) -> list[np.ndarray]:
    wanted = [sizes[rng.integers(0, len(sizes), count)] for rng, count in zip(rngs, counts)]
    places = [(plan.forbidden, plan.size) for plan in plans]
    return sample_backgrounds_of(*zip(*places), wanted, rngs)

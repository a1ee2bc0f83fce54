"""Which four samples make Jigsaw image number p: a function of (seed, p) alone.

Image p takes draws 2p and 2p + 1 of group S, draw p of T and draw p of W. The draws of a group run
through passes; each pass is a fresh permutation of the group. So any worker of any rank can name
the samples of any image without having walked there: ranks that make different images take disjoint
parts of each pass, and resuming needs no more than the number of the next image.
"""

import logging
from collections.abc import Iterator

import numpy as np

from jigsaw_d2.data.samples import GROUPS, TALL_BELOW, WIDE_ABOVE
from jigsaw_d2.io import ConfigError, DataError

logger = logging.getLogger(__name__)


class JigsawSampler:
    """Endless (S, S, T, W) quadruples, addressed by image number.

    Args:
        sizes: (n, 2) sample (height, width) as shown in the image, pixels.
        groups: (n,) index of each sample into ``samples.GROUPS``.
        seed: of every permutation.
        repeat_factors: (n,) >= 1, expected draws of each sample per pass; None = once each.
        size_aware: of the two draws of group S in an image, one is from the smaller half of each
            pass by area, the other from the larger half.

    Raises:
        DataError: no samples at all.
    """

    def __init__(
        self,
        *,
        sizes: np.ndarray,
        groups: np.ndarray,
        seed: int,
        repeat_factors: np.ndarray | None = None,
        size_aware: bool = False,
    ) -> None:
        if len(groups) == 0:
            raise DataError("the sample store is empty: extract samples from annotated images")
        self.seed = int(seed)
        own = [np.flatnonzero(groups == code).astype(np.int32) for code in range(len(GROUPS))]
        self.members = [m if len(m) else _borrow(code, sizes) for code, m in enumerate(own)]
        balanced = repeat_factors is not None
        self._factors = [repeat_factors[m] if balanced else None for m in self.members]
        self._areas = sizes.prod(axis=1) if size_aware else None
        self._passes: dict[tuple[int, int], np.ndarray] = {}

    def pass_length(self, group: int) -> int:
        """Draws in one pass through ``group``: its samples, or the sum of their repeat factors."""
        factors = self._factors[group]
        return len(self.members[group]) if factors is None else int(np.ceil(factors.sum()))

    def permutation(self, group: int, number: int) -> np.ndarray:
        """int32 sample ids of pass ``number`` through ``group``, in the order of their draws."""
        order = self._passes.get((group, number))
        if order is None:
            rng = np.random.default_rng((self.seed, group, number))
            order = self._draw_pass(group, rng)
            if self._areas is not None and group == 0:
                order = self._alternate(order, number * len(order))
            # Draws move forward, a worker's by leaps: other passes than this one's neighbours are
            # not needed again.
            for key in [k for k in self._passes if k[0] == group and abs(k[1] - number) > 1]:
                del self._passes[key]
            self._passes[group, number] = order
        return order

    def _draw_pass(self, group: int, rng: np.random.Generator) -> np.ndarray:
        order = rng.permutation(self.members[group])
        if self._factors[group] is None:
            return order
        # Systematic sampling rounds the factors at random so that every pass is equally long, a
        # sample comes floor or ceil of its share, and a draw's pass follows from its number.
        length = self.pass_length(group)
        ends = np.cumsum(self._factors[group][np.searchsorted(self.members[group], order)])
        ticks = np.floor(ends * (length / ends[-1]) + rng.random()).astype(np.int64)
        ticks[-1] = length
        return rng.permutation(np.repeat(order, np.diff(ticks, prepend=0)))

    def _alternate(self, order: np.ndarray, first: int) -> np.ndarray:
        """The pass with its smaller samples on even draws, in the order of a random pass each.

        ``first``: number of the pass's first draw.
        """
        even = (first + np.arange(len(order))) % 2 == 0
        small = np.zeros(len(order), bool)
        small[np.argsort(self._areas[order], kind="stable")[: even.sum()]] = True
        result = np.empty_like(order)
        result[even], result[~even] = order[small], order[~small]
        return result

    def draw(self, group: int, number: int) -> int:
        """Sample id of draw ``number`` of ``group``."""
        which, offset = divmod(number, self.pass_length(group))
        return self.permutation(group, which).item(offset)

    def quadruple(self, position: int) -> np.ndarray:
        """int64 (4,) sample ids of image ``position``, in draw order S, S, T, W."""
        return np.array([self.draw(*_draw_of(slot, position)) for slot in range(4)], np.int64)

    def replacements(self, slot: int, position: int) -> Iterator[int]:
        """Samples that stand in, one after the other, for a damaged one.

        Args:
            slot: 0..3 in the draw order of ``quadruple``.

        Yields:
            ids of the draws that follow in the slot's group, for one whole pass.
        """
        group, first = _draw_of(slot, position)
        for number in range(first + 1, first + 1 + self.pass_length(group)):
            yield self.draw(group, number)


def _draw_of(slot: int, position: int) -> tuple[int, int]:
    """(group, number of its draw) that a slot S, S, T, W of image ``position`` shows."""
    return (0, 2 * position + slot) if slot < 2 else (slot - 1, position)


def _borrow(code: int, sizes: np.ndarray) -> np.ndarray:
    """Samples whose aspect ratio is nearest to an empty group's (P2.7), int32, with one warning."""
    ratios = sizes[:, 1] / sizes[:, 0]
    bounds = {"S": (TALL_BELOW, WIDE_ABOVE), "T": (0, TALL_BELOW), "W": (WIDE_ABOVE, np.inf)}
    low, high = bounds[GROUPS[code]]
    # Distance of log aspect ratio: half as wide is as far from square as twice as wide.
    distance = np.abs(np.log(ratios / np.clip(ratios, low, high)))
    # A tenth of the store, so that the slot still sees variety.
    count = max(1, min(len(sizes), -(-len(sizes) // 10)))
    nearest = np.sort(np.argsort(distance, kind="stable")[:count]).astype(np.int32)
    shown = ratios[nearest]
    logger.warning(
        f"no sample of group {GROUPS[code]} (width / height {low} to {high}) among {len(sizes)}: "
        f"its region shows the {count} nearest instead, width / height {shown.min():.2f} to "
        f"{shown.max():.2f}"
    )
    return nearest


def repeat_factors(classes: np.ndarray, threshold: float) -> np.ndarray:
    """max(1, sqrt(threshold / frequency of the sample's class)), float64 (n,).

    The rule of Detectron2's ``RepeatFactorTrainingSampler`` by sample; background is a class.
    Raises ConfigError where ``threshold`` is not positive, so that nothing would be balanced.
    """
    if not threshold > 0:
        raise ConfigError(
            "class-balanced sampling repeats classes rarer than DATALOADER.REPEAT_THRESHOLD, "
            f"which is {threshold}: set a frequency such as 0.05, or INPUT.JIGSAW.SAMPLING to "
            "uniform"
        )
    frequency = np.bincount(classes) / max(len(classes), 1)
    return np.maximum(1.0, np.sqrt(threshold / frequency[classes]))

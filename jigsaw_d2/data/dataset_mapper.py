"""Four sample numbers -> one Jigsaw image and its four classes."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode, configurable

from jigsaw_d2.data.assembly import METHODS, Augmentation, paint, place_sample
from jigsaw_d2.errors import JigsawError
from jigsaw_d2.sample_store import DamagedSampleError, SampleStore
from jigsaw_d2.store.jpeg_decoding import PixelMemory
from jigsaw_d2.data.template import JigsawTemplate

logger = logging.getLogger(__name__)


class MapperError(JigsawError, ValueError):
    """Input options that no Jigsaw image can follow."""


class JigsawImage(NamedTuple):
    """What one image shows, in region order R1..R4."""

    sample_ids: list[int]
    gt_classes: list[int]
    damaged: list[tuple[int, str]]  # samples that were replaced, and why


class PositionDraws:
    """Four draws from [0, 1) for each sample of an image: a function of (seed, image number).

    Made for ``BLOCK`` images at a time, since starting a generator costs more than drawing from it.
    """

    BLOCK = 64

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._number = -1
        self._block: list[list[list[float]]] = []

    def at(self, position: int) -> list[list[float]]:
        """The draws of image ``position``, (4, 4): samples in region order, then their draws."""
        number, offset = divmod(position, self.BLOCK)
        if number != self._number:
            rng = np.random.default_rng((self.seed, number))
            self._block, self._number = rng.random((self.BLOCK, 4, 4)).tolist(), number
        return self._block[offset]


class JigsawDatasetMapper:
    """Makes a Jigsaw image from its number and four sample ids, in these steps:

    1. draw scale, flip and crop position of each sample from (seed, position) alone;
    2. the S sample of smaller area goes to R1, the larger to R4, W to R2, T to R3 (Sec. 3.2);
    3. lay each sample into its region, and decode only the window that will be seen;
    4. resize what is seen, flip it and draw it into the canvas, zeros around it.

    "Area" is that of the stored sample before it is resized: which region a sample goes to does
    not depend on the draw.
    """

    @configurable
    def __init__(
        self,
        *,
        store: SampleStore,
        template: JigsawTemplate,
        method: str = "pad_crop",
        scale_range: tuple[float, float] = (0.8, 1.5),
        flip_prob: float = 0.5,
        context: bool = True,
        image_format: str = "RGB",
        seed: int = 0,
    ) -> None:
        """
        Args:
            method: one of ``assembly.METHODS``.
            scale_range: ratios between which each sample's is drawn uniformly.
            flip_prob: probability of a horizontal flip, per sample.
            context: False shows a positive's annotated box without what is stored around it.
            image_format: channel order of the result, "RGB" or "BGR".
            seed: with a position, fixes every draw.

        Raises:
            MapperError: an option outside its range, by the name of its key.
        """
        low, high = scale_range
        if not 0 < low <= high:
            raise MapperError(f"INPUT.JIGSAW.SCALE_RANGE = {scale_range}: needs 0 < low <= high")
        if not 0 <= flip_prob <= 1:
            raise MapperError(f"INPUT.JIGSAW.FLIP_PROB = {flip_prob} is not a probability")
        if method not in METHODS:
            raise MapperError(f"INPUT.JIGSAW.FIT = {method!r}: use one of {', '.join(METHODS)}")
        if image_format not in ("RGB", "BGR"):
            raise MapperError(f"INPUT.FORMAT = {image_format!r}: use RGB or BGR")
        self.store, self.template = store, template
        self.method, self.context, self.image_format = method, context, image_format
        self.scale_range, self.flip_prob, self.seed = (float(low), float(high)), flip_prob, seed
        self.classes, self.sizes = store.classes, store.sizes
        self.windows = None if context else annotated_windows(store)
        self._boxes = template.boxes.tolist()
        self._draws, self._memory = PositionDraws(seed), PixelMemory()

    @classmethod
    def from_config(cls, cfg: CfgNode, store: SampleStore, seed: int | None = None) -> dict:
        """Arguments of ``__init__`` by their keys; ``seed`` None: ``SEED``, 0 at least."""
        options = cfg.INPUT.JIGSAW
        return {
            "store": store,
            "template": JigsawTemplate.from_config(cfg),
            "method": options.FIT,
            "scale_range": tuple(options.SCALE_RANGE),
            "flip_prob": options.FLIP_PROB,
            "context": options.CONTEXT,
            "image_format": cfg.INPUT.FORMAT,
            "seed": max(cfg.SEED, 0) if seed is None else seed,
        }

    def shown_sizes(self) -> np.ndarray:
        """int (n, 2) (height, width) of each sample as it is shown: with or without context."""
        if self.windows is None:
            return self.sizes
        return np.stack(
            [self.windows[:, 3] - self.windows[:, 1], self.windows[:, 2] - self.windows[:, 0]], 1
        )

    def __call__(self, record: dict) -> dict:
        """
        Args:
            record: {"position": int, "sample_ids": int (4,) in draw order S, S, T, W}, and
                optionally "replacements": slot -> iterator of ids for damaged samples.

        Returns:
            {"image": uint8 (3, H, W) tensor, channels innermost in memory; "gt_classes": int64
            (4,) tensor and "sample_ids": int64 (4,) array in region order; "damaged": list of
            (id, reason)}.

        Raises:
            DamagedSampleError: a sample cannot be decoded and nothing may replace it.
        """
        out = np.empty((self.template.height, self.template.width, 3), np.uint8)
        made = self.draw_into(
            out, record["position"], record["sample_ids"], record.get("replacements")
        )
        return {
            "image": torch.from_numpy(out.transpose(2, 0, 1)),
            "gt_classes": torch.from_numpy(np.array(made.gt_classes)),
            "sample_ids": np.array(made.sample_ids),
            "damaged": made.damaged,
        }

    def draw_into(
        self,
        out: np.ndarray,
        position: int,
        sample_ids: np.ndarray,
        replacements: Callable[[int], Iterator[int]] | None = None,
    ) -> JigsawImage:
        """As ``__call__``, into ``out`` uint8 (H, W, 3), all of which is overwritten."""
        out.fill(0)
        made = JigsawImage([], [], [])
        ids = list(map(int, sample_ids))
        rows = zip(self.region_slots(ids), self._boxes, self.draw_augmentations(position))
        for slot, (x0, y0, x1, y1), augmentation in rows:
            shown, region = ids[slot], out[y0:y1, x0:x1]
            try:
                self._draw_sample(shown, region, augmentation)
            except DamagedSampleError as error:
                made.damaged.append((shown, str(error)))
                others = replacements(slot) if replacements else ()
                shown = self._draw_first_whole(others, region, augmentation, made.damaged)
            made.sample_ids.append(shown)
            made.gt_classes.append(self.classes.item(shown))
        if self.image_format == "BGR":
            cv2.cvtColor(out, cv2.COLOR_RGB2BGR, out)
        return made

    def region_slots(self, sample_ids: Sequence[int]) -> tuple[int, int, int, int]:
        """Which of the draws S, S, T, W goes to R1, R2, R3, R4; at equal areas the first to R1."""
        first, second = self._area(sample_ids[0]), self._area(sample_ids[1])
        return (0, 3, 2, 1) if first <= second else (1, 3, 2, 0)

    def _window(self, i: int) -> tuple[int, int, int, int]:
        """XYXY sample pixels of the part of sample ``i`` that may be shown."""
        if self.windows is not None:
            return tuple(self.windows[i].tolist())
        return 0, 0, self.sizes.item(i, 1), self.sizes.item(i, 0)

    def _area(self, i: int) -> int:
        x0, y0, x1, y1 = self._window(i)
        return (x1 - x0) * (y1 - y0)

    def draw_augmentations(self, position: int) -> list[Augmentation]:
        """The four samples' draws of image ``position``, in region order."""
        low, high = self.scale_range
        return [
            Augmentation(low + (high - low) * a, b < self.flip_prob, c, d)
            for a, b, c, d in self._draws.at(position)
        ]

    def _draw_first_whole(
        self,
        candidates: Iterable[int],
        region: np.ndarray,
        augmentation: Augmentation,
        damaged: list[tuple[int, str]],
    ) -> int:
        """Draw the first candidate that decodes; returns its id, adds the others to ``damaged``."""
        for i in candidates:
            try:
                self._draw_sample(i, region, augmentation)
                return i
            except DamagedSampleError as error:
                damaged.append((i, str(error)))
        raise DamagedSampleError(
            f"no sample of a whole group can be decoded; the first of {len(damaged)}: "
            f"{damaged[0][1]}"
        )

    def _draw_sample(self, i: int, region: np.ndarray, augmentation: Augmentation) -> None:
        left, top, right, bottom = self._window(i)
        size = (bottom - top, right - left)
        placement = place_sample(size, region.shape[:2], self.method, augmentation)
        x0, y0, x1, y1 = placement.window
        window = (left + x0, top + y0, left + x1, top + y1)
        source = self.store.decode(i, window, self._memory)
        paint(source, placement, region)

    def used_boxes(self, position: int, sample_ids: Sequence[int]) -> np.ndarray:
        """int64 (4, 4) XYXY canvas pixels that the samples cover, R1..R4; the rest is padding.

        Args:
            position: of an image made by this mapper.
            sample_ids: what it shows, in region order.
        """
        boxes = []
        rows = zip(sample_ids, self._boxes, self.draw_augmentations(position))
        for i, (x0, y0, x1, y1), augmentation in rows:
            left, top, right, bottom = self._window(int(i))
            size = (bottom - top, right - left)
            y, x, *_ = place_sample(size, (y1 - y0, x1 - x0), self.method, augmentation)
            near = (x0 + x.paste, y0 + y.paste)
            boxes.append((*near, near[0] + x.shown, near[1] + y.shown))
        return np.array(boxes, np.int64)


def annotated_windows(store: SampleStore) -> np.ndarray:
    """int32 (n, 4) XYXY sample pixels of each sample's annotated box, widened to whole pixels.

    A background sample has none and is shown whole.
    """
    offsets = store.boxes[:, :2]
    low = np.floor(store.gt_boxes[:, :2] - offsets)
    high = np.ceil(store.gt_boxes[:, 2:] - offsets)
    sizes = store.sizes[:, ::-1]
    low = np.clip(low, 0, sizes - 1)
    return np.concatenate([low, np.clip(high, low + 1, sizes)], axis=1).astype(np.int32)

"""Four sample numbers -> one Jigsaw image and its four classes."""

import itertools
from collections.abc import Iterable, Sequence

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode, configurable

from jigsaw_d2.data.arrays import channels_of
from jigsaw_d2.data.assembly import METHODS, Augmentation, Placement, paint, place_sample
from jigsaw_d2.data.samples import group_codes
from jigsaw_d2.data.store import DamagedSampleError, SampleStore
from jigsaw_d2.data.template import JigsawTemplate
from jigsaw_d2.io import ConfigError

# Images that are drawn for at a time, since starting a generator costs more than drawing from it.
DRAW_BLOCK = 64


class JigsawDatasetMapper:
    """Makes a Jigsaw image from its number and four sample ids, in these steps:

    1. draw scale, flip and crop position of each sample from (seed, position) alone;
    2. the S sample of smaller area, as stored, goes to R1, the larger to R4, W to R2, T to R3
       (Sec. 3.2);
    3. lay each sample into its region, and decode only the window that will be seen;
    4. resize what is seen, flip it and draw it into the canvas, zeros around it.
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
        with_boxes: bool = False,
        seed: int = 0,
    ) -> None:
        """
        Args:
            method: one of ``assembly.METHODS``.
            scale_range: ratios between which each sample's is drawn uniformly.
            flip_prob: probability of a horizontal flip, per sample.
            context: False shows a positive's annotated box without what is stored around it.
            image_format: channel order of the result, "RGB" or "BGR"; or the store's channels.
            with_boxes: the result has "shown_boxes" too.
            seed: with a position, fixes every draw.

        Raises:
            ConfigError: an option outside its range, by the name of its key.
        """
        low, high = scale_range
        if not 0 < low <= high:
            raise ConfigError(f"INPUT.JIGSAW.SCALE_RANGE = {scale_range}: needs 0 < low <= high")
        if not 0 <= flip_prob <= 1:
            raise ConfigError(f"INPUT.JIGSAW.FLIP_PROB = {flip_prob} is not a probability")
        if method not in METHODS:
            raise ConfigError(f"INPUT.JIGSAW.FIT = {method!r}: use one of {', '.join(METHODS)}")
        channels = channels_of(image_format) or 3
        if image_format.startswith("YUV") or channels != store.channels:
            raise ConfigError(
                f"INPUT.FORMAT = {image_format!r}: use RGB or BGR; of a store of arrays "
                f"C and the number of channels, here C{store.channels}"
            )
        self.store, self.template = store, template
        self.method, self.context, self.image_format = method, context, image_format
        self.with_boxes = with_boxes
        self.scale_range, self.flip_prob, self.seed = (float(low), float(high)), flip_prob, seed
        self.classes = store.classes
        self.windows = None if context else annotated_windows(store)
        self._boxes = template.boxes.tolist()
        self._block_number, self._block = -1, []

    @classmethod
    def from_config(cls, cfg: CfgNode, store: SampleStore, seed: int | None = None) -> dict:
        """Arguments of ``__init__`` by their keys; ``seed`` None: ``SEED``, 0 at least."""
        options, jigsaw = cfg.INPUT.JIGSAW, cfg.MODEL.JIGSAW
        return {
            "store": store,
            "template": JigsawTemplate(*options.TEMPLATE_SIZE, *options.TEMPLATE_SPLIT),
            "method": options.FIT,
            "scale_range": tuple(options.SCALE_RANGE),
            "flip_prob": options.FLIP_PROB,
            "context": options.CONTEXT,
            "image_format": cfg.INPUT.FORMAT,
            "with_boxes": jigsaw.IGNORE_PADDING or jigsaw.LEVELS == "assign",
            "seed": max(cfg.SEED, 0) if seed is None else seed,
        }

    @property
    def dtype(self) -> type:
        """Of images: as stored, but float32 of all that is not uint8."""
        return np.uint8 if self.store.dtype == np.uint8 else np.float32

    def shown_sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """int (n, 2) (height, width) of each sample as shown, by ``context``; (n,) its group."""
        if self.windows is None:
            return self.store.sizes, self.store.groups
        sizes = (self.windows[:, 2:] - self.windows[:, :2])[:, ::-1]
        return sizes, group_codes(sizes[:, 1], sizes[:, 0])

    def __call__(self, record: dict, out: np.ndarray | None = None) -> dict:
        """
        Args:
            record: {"position": int, "sample_ids": int (4,) in draw order S, S, T, W}, and
                optionally "replacements": slot -> iterator of ids for damaged samples.
            out: uint8 (H, W, 3) that the image is drawn into; None = fresh memory. Of arrays C
                channels, of ``dtype``.

        Returns:
            {"image": uint8 (3, H, W) tensor, channels innermost in memory; "gt_classes" and
            "sample_ids": int64 (4,) tensors in region order; "damaged": list of (id, reason) of
            the samples that were replaced; if asked for, "shown_boxes": ``used_boxes``, int64
            (4, 4)}.

        Raises:
            DamagedSampleError: a sample cannot be decoded and nothing may replace it.
        """
        if out is None:
            size = (self.template.height, self.template.width, self.store.channels)
            out = np.empty(size, self.dtype)
        out.fill(0)
        ids, shown, damaged = list(map(int, record["sample_ids"])), [], []
        replacements = record.get("replacements", lambda slot: ())
        augmentations = self.draw_augmentations(record["position"])
        rows = zip(self.region_slots(ids), self._boxes, augmentations)
        for slot, (x0, y0, x1, y1), augmentation in rows:
            candidates = itertools.chain([ids[slot]], replacements(slot))
            shown.append(
                self._draw_first_whole(candidates, out[y0:y1, x0:x1], augmentation, damaged)
            )
        if self.image_format == "BGR":
            cv2.cvtColor(out, cv2.COLOR_RGB2BGR, out)
        made = {
            "image": torch.from_numpy(out.transpose(2, 0, 1)),
            "gt_classes": torch.tensor([self.classes.item(i) for i in shown]),
            "sample_ids": torch.tensor(shown),
            "damaged": damaged,
        }
        if self.with_boxes:
            made["shown_boxes"] = torch.from_numpy(self.used_boxes(record["position"], shown))
        return made

    def region_slots(self, sample_ids: Sequence[int]) -> tuple[int, int, int, int]:
        """Which of the draws S, S, T, W goes to R1, R2, R3, R4; at equal areas the first to R1."""
        (x0, y0, x1, y1), (left, top, right, bottom) = map(self._window, sample_ids[:2])
        first_smaller = (x1 - x0) * (y1 - y0) <= (right - left) * (bottom - top)
        return (0, 3, 2, 1) if first_smaller else (1, 3, 2, 0)

    def draw_augmentations(self, position: int) -> list[Augmentation]:
        """The four samples' draws of image ``position``, in region order."""
        number, offset = divmod(position, DRAW_BLOCK)
        if number != self._block_number:
            rng = np.random.default_rng((self.seed, number))
            self._block, self._block_number = rng.random((DRAW_BLOCK, 4, 4)).tolist(), number
        low, high = self.scale_range
        return [
            Augmentation(low + (high - low) * a, b < self.flip_prob, c, d)
            for a, b, c, d in self._block[offset]
        ]

    def _window(self, i: int) -> tuple[int, int, int, int]:
        """XYXY sample pixels of the part of sample ``i`` that may be shown."""
        if self.windows is not None:
            return tuple(self.windows[i].tolist())
        return 0, 0, self.store.sizes.item(i, 1), self.store.sizes.item(i, 0)

    def _place(self, i: int, region: tuple[int, int], augmentation: Augmentation) -> Placement:
        left, top, right, bottom = self._window(i)
        return place_sample((bottom - top, right - left), region, self.method, augmentation)

    def _draw_first_whole(
        self,
        candidates: Iterable[int],
        region: np.ndarray,
        augmentation: Augmentation,
        damaged: list[tuple[int, str]],
    ) -> int:
        """Draw the first candidate that decodes; returns its id, adds the others to ``damaged``."""
        failed = []
        for i in candidates:
            left, top, *_ = self._window(i)
            placement = self._place(i, region.shape[:2], augmentation)
            x0, y0, x1, y1 = placement.window
            window = (left + x0, top + y0, left + x1, top + y1)
            try:
                paint(self.store.decode(i, window), placement, region)
            except DamagedSampleError as error:
                failed.append((i, str(error)))
            else:
                damaged += failed
                return i
        raise DamagedSampleError(
            f"no sample of a whole group can be decoded; the first of {len(failed)}: {failed[0][1]}"
        )

    def used_boxes(self, position: int, sample_ids: Sequence[int]) -> np.ndarray:
        """int64 (4, 4) XYXY canvas pixels that the samples cover, R1..R4; the rest is padding.

        ``sample_ids``: what image ``position`` of this mapper shows, in region order.
        """
        boxes = []
        rows = zip(sample_ids, self._boxes, self.draw_augmentations(position))
        for i, (x0, y0, x1, y1), augmentation in rows:
            y, x, *_ = self._place(int(i), (y1 - y0, x1 - x0), augmentation)
            left, top = x0 + x.paste, y0 + y.paste
            boxes.append((left, top, left + x.shown, top + y.shown))
        return np.array(boxes, np.int64)


def annotated_windows(store: SampleStore) -> np.ndarray:
    """int32 (n, 4) XYXY sample pixels of each sample's annotated box, widened to whole pixels.

    A background sample has none and is shown whole.
    """
    offsets, sizes = store.boxes[:, :2], store.sizes[:, ::-1]
    low = np.clip(np.floor(store.gt_boxes[:, :2] - offsets), 0, sizes - 1)
    high = np.ceil(store.gt_boxes[:, 2:] - offsets)
    return np.concatenate([low, np.clip(high, low + 1, sizes)], axis=1).astype(np.int32)

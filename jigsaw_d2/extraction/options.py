"""How to extract samples, and which of them are written for window decoding."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

import numpy as np

from jigsaw_d2.extraction.log import ExtractionError
from jigsaw_d2.data.samples import GROUPS, group_codes
from jigsaw_d2.store.chunks import DEFAULT_QUALITY, ENCODINGS
from jigsaw_d2.store.writer import DEFAULT_SHARD_SIZE
from jigsaw_d2.data.template import REGION_GROUPS, JigsawTemplate

CHOICES = ("auto", *ENCODINGS)
# Bytes of pixels that "auto" leaves uncompressed: what stays in the memory of any machine that
# trains a detector, so that reading takes no longer than from a tenth of the bytes.
UNCOMPRESSED_UP_TO = 1 << 30


@dataclass(frozen=True)
class ExtractionOptions:
    """How to extract. The first block determines the store's bytes, the second does not.

    Attributes:
        max_scale: a positive's sides grow to at most this times the box (Sec. 3.1); 1 = no context.
        negative_ratio: negatives per positive over the dataset (Sec. 3.1: 1 to 10).
        quality: of the JPEGs, 1 to 100; asks for JPEGs where ``encoding`` is "auto". None: 95, as
            near to the source as JPEG sensibly gets.
        encoding: "jpeg"; "png", slow to read; "ppm", uncompressed: about ten times the bytes and
            nothing to decode; or "auto": "ppm" where all pixels of the dataset's samples take at
            most ``UNCOMPRESSED_UP_TO`` bytes, else "jpeg". "png" and "ppm" are without loss.
        class_files: add a ``.cls`` member with the class beside each sample.
        min_side: pixels; a box with a shorter side is skipped. Ours: 2, one-pixel boxes show
            nothing.
        shard_size: bytes that a shard may hold.
        template: what the samples will be shown in; decides which are written for window decoding,
            and the report.
        scale_range: ratios that samples are resized by before they are shown (Sec. 4.1).
        part: (i, n): extract the i-th of n parts, i from 1.
        workers: processes; 0 = in this one; None = one for each core.
        strict: stop at the first fault in the input.
        overwrite: replace an existing store.
        progress: show a progress bar.
    """

    seed: int = 0
    max_scale: float = 2.0
    negative_ratio: float = 0.1
    quality: int | None = None
    encoding: str = "auto"
    class_files: bool = False
    min_side: float = 2.0
    shard_size: int = DEFAULT_SHARD_SIZE
    template: JigsawTemplate = JigsawTemplate()
    scale_range: tuple[float, float] = (0.8, 1.5)
    part: tuple[int, int] = (1, 1)

    workers: int | None = None
    strict: bool = False
    overwrite: bool = False
    progress: bool = False

    def __post_init__(self) -> None:
        checks = {
            "seed": (self.seed >= 0, "0 or more"),
            "max_scale": (self.max_scale >= 1, "1 or more (1 = no context)"),
            "negative_ratio": (
                self.negative_ratio >= 0,
                "0 or more, e.g. 0.1 for one to ten positives",
            ),
            "quality": (self.quality is None or 1 <= self.quality <= 100, "from 1 to 100"),
            "encoding": (self.encoding in CHOICES, f"one of {', '.join(CHOICES)}"),
            "shard_size": (self.shard_size > 0, "positive"),
            "scale_range": (0 < self.scale_range[0] <= self.scale_range[1], "0 < low <= high"),
            "part": (1 <= self.part[0] <= self.part[1], "i/n with 1 <= i <= n"),
            "workers": (self.workers is None or self.workers >= 0, "0 or more"),
        }
        for name, (good, wanted) in checks.items():
            if not good:
                raise ExtractionError(f"{name} is {getattr(self, name)}; it must be {wanted}")
        if self.quality is not None and self.encoding in ("png", "ppm"):
            raise ExtractionError(
                f"quality is {self.quality}, which only JPEGs have; encoding is {self.encoding}: "
                "leave one of them out"
            )

    def content(self) -> dict:
        """What determines the bytes of the store, for the header."""
        names = list(asdict(self))
        return {name: asdict(self)[name] for name in names[: names.index("part")]}

    def settle_encoding(self, boxes: Iterable[np.ndarray]) -> "ExtractionOptions":
        """The options with encoding and quality that they leave open decided.

        Args:
            boxes: XYXY of all samples of the dataset, whatever part is extracted: (n, 4) each.
        """
        encoding, quality = self.encoding, self.quality
        if encoding == "auto":
            sides = (b[:, 2:].astype(np.float64) - b[:, :2] for b in boxes)
            pixels = 3 * sum(float(s.prod(axis=1).sum()) for s in sides)
            small = quality is None and pixels <= UNCOMPRESSED_UP_TO
            encoding = "ppm" if small else "jpeg"
        quality = quality or DEFAULT_QUALITY if encoding == "jpeg" else None
        return replace(self, encoding=encoding, quality=quality)


def shown_sizes(template: JigsawTemplate, min_scale: float) -> np.ndarray:
    """int (3, 2): the most (height, width), sample pixels, that a group's smallest region shows."""
    shown = np.full((3, 2), np.iinfo(np.int64).max)
    for group, size in zip(REGION_GROUPS, template.region_sizes):
        code = GROUPS.index(group)
        shown[code] = np.minimum(shown[code], np.ceil(np.array(size) / min_scale))
    return shown


def needs_windows(boxes: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """Which samples of boxes (n, 4) are larger than some region can show; bool (n,)."""
    sizes = (boxes[:, 2:] - boxes[:, :2])[:, ::-1]
    return (sizes > shown[group_codes(sizes[:, 1], sizes[:, 0])]).any(axis=1)

"""Read a sample store: memory-mapped, opened in the same time whatever its size.

Worker processes share the pages of index and shards: nothing per sample lives in Python objects.
"""

import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from jigsaw_d2.store.format import DamagedSampleError, StoreError, StoreGoneError
from jigsaw_d2.store.jpeg_decoding import PixelMemory
from jigsaw_d2.store.part import StorePart, find_parts

__all__ = ["DamagedSampleError", "SampleStore", "StoreError", "StoreGoneError"]


class SampleStore:
    """Samples of one store, or of several parts of one, numbered 0 .. len - 1.

    Picklable, and safe to share over fork. All arrays are read-only views of the index.

    Attributes:
        classes: int64 (n,), index into ``categories``; background = len(categories).
        groups: uint8 (n,), index into ``samples.GROUPS``.
        sizes: int32 (n, 2), (height, width) of the sample as shown.
        image_ids: int64 (n,) of the source images.
        boxes: float32 (n, 4) XYXY cut from the source image, source pixels, integral.
        gt_boxes: float32 (n, 4) XYXY annotated box inside it, source pixels; negatives: = boxes.

    Raises:
        StoreError: no whole store there, another format version, or parts that do not match.
    """

    def __init__(self, path: str | os.PathLike | Sequence[str | os.PathLike]) -> None:
        single = isinstance(path, (str, os.PathLike))
        self.paths = [part for p in ([path] if single else path) for part in find_parts(Path(p))]
        if not self.paths:
            raise StoreError("no sample store named; give at least one folder")
        self.parts = [StorePart(p) for p in self.paths]
        self._starts = list(accumulate((len(p.index) for p in self.parts), initial=0))
        self.header = self.parts[0].header
        self.categories: list[str] = self.header["categories"]
        for part in self.parts[1:]:
            if part.header["categories"] != self.categories:
                raise StoreError(f"{part.path} has other categories than {self.paths[0]}")

    def _column(self, name: str) -> np.ndarray:
        columns = [part.index[name] for part in self.parts]
        return columns[0] if len(columns) == 1 else np.concatenate(columns)

    @property
    def fingerprint(self) -> str:
        """Changes whenever the content does."""
        return "+".join(part.header["fingerprint"] for part in self.parts)

    classes = property(lambda self: self._column("class"))
    groups = property(lambda self: self._column("group"))
    sizes = property(lambda self: self._column("size"))
    image_ids = property(lambda self: self._column("image_id"))
    boxes = property(lambda self: self._column("box"))
    gt_boxes = property(lambda self: self._column("gt_box"))

    def check_unchanged(self) -> None:
        """Raises StoreGoneError unless every part on disk is the one that was opened."""
        for part in self.parts:
            part.check_unchanged()

    def __len__(self) -> int:
        return self._starts[-1]

    def _locate(self, i: int) -> tuple[StorePart, int]:
        i = int(i)
        if not 0 <= i < self._starts[-1]:
            raise IndexError(f"sample {i} of a store of {len(self)}")
        number = bisect_right(self._starts, i) - 1
        return self.parts[number], i - self._starts[number]

    def __getitem__(self, i: int) -> bytes:
        """The encoded sample: a whole ordinary JPEG, PNG, PPM or PGM, not checked."""
        part, i = self._locate(i)
        return bytes(part.view(i))

    def key(self, i: int) -> str:
        """Name of sample ``i`` within its shard, without suffix."""
        part, i = self._locate(i)
        return part.key(i)

    def read_checked(self, i: int) -> bytes:
        """``self[i]``, after comparing its CRC-32 with the index.

        Raises:
            DamagedSampleError: naming shard, key and reason.
        """
        part, i = self._locate(i)
        return bytes(part.view_checked(i))

    def decode(
        self,
        i: int,
        window: tuple[int, int, int, int] | None = None,
        memory: PixelMemory | None = None,
    ) -> np.ndarray:
        """uint8 RGB (h, w, 3) of sample ``i``, or of ``window`` (XYXY ints, sample pixels).

        Of a sample written with restart intervals only the pieces under the window are decoded;
        the pixels are those of the full decode. May be a view of a larger array, or, read-only, of
        the mapped shard.

        Args:
            memory: may hold the result, which is then valid until its next use; faster than fresh
                memory for each sample.

        Raises:
            DamagedSampleError: naming shard, key and reason.
            ValueError: an empty window or one that leaves the sample.
        """
        part, i = self._locate(i)
        return part.decode(i, window, memory)

"""Read a sample store: memory-mapped, opened in the same time whatever its size.

Worker processes share the pages of index and shards: nothing per sample lives in Python objects.
"""

import mmap
import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from jigsaw_d2.store import jpeg_windows
from jigsaw_d2.store.format import (
    HEADER_NAME,
    INDEX_NAME,
    JPEG,
    PNG,
    RECORD,
    DamagedSampleError,
    StoreError,
    StoreGoneError,
    crc32,
    part_name,
    read_header,
    sample_key,
)
from jigsaw_d2.store.jpeg_decoding import PixelMemory, decode_jpeg
from jigsaw_d2.store.netpbm import decode_netpbm

__all__ = ["DamagedSampleError", "SampleStore", "StoreError", "StoreGoneError"]


class StorePart:
    """One folder: its header, its index, and its shards, each mapped when first read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = read_header(path)
        self.identity = self._stat()
        self._open()

    def _stat(self) -> tuple[int, int, int]:
        try:
            stat = os.stat(self.path / INDEX_NAME)
        except OSError as error:
            raise StoreGoneError(f"{self.path / INDEX_NAME} is gone: {error.strerror}") from error
        return stat.st_ino, stat.st_mtime_ns, stat.st_size

    def _open(self) -> None:
        try:
            index = np.load(self.path / INDEX_NAME, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise StoreError(
                f"{self.path / INDEX_NAME} cannot be read as an index: {error}"
            ) from error
        if index.dtype != RECORD or len(index) != self.header["samples"]:
            raise StoreError(f"{self.path / INDEX_NAME} does not belong to the header beside it")
        self.index = index.view(np.ndarray)
        self.offsets, self.lengths = self.index["offset"], self.index["length"]
        self.shard_numbers, self.checksums = self.index["shard"], self.index["crc32"]
        self.sizes, self.formats = self.index["size"], self.index["format"]
        self.intervals = self.index["interval"]
        self._shards: list[mmap.mmap | None] = [None] * len(self.header["shards"])

    def check_unchanged(self) -> None:
        """Raises StoreGoneError unless the store on disk is the one that was opened."""
        if self._stat() != self.identity:
            raise StoreGoneError(f"{self.path} was replaced since it was opened; start again")

    def shard(self, number: int) -> mmap.mmap:
        """The mapped bytes of one shard."""
        mapped = self._shards[number]
        if mapped is None:
            self.check_unchanged()
            file = self.path / self.header["shards"][number]["name"]
            try:
                with open(file, "rb") as stream:
                    mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise StoreGoneError(f"{file} cannot be opened: {error}") from error
            self._shards[number] = mapped
        return mapped

    def view(self, i: int) -> memoryview:
        """The encoded sample where it is mapped, not checked."""
        offset, number = self.offsets.item(i), self.shard_numbers.item(i)
        mapped = self._shards[number] or self.shard(number)
        return memoryview(mapped)[offset : offset + self.lengths.item(i)]

    def view_checked(self, i: int) -> memoryview:
        """``view``; raises DamagedSampleError unless its CRC-32 is that of the index."""
        data = self.view(i)
        if crc32(data) != self.checksums.item(i):
            raise self.damaged(i, "its CRC-32 differs from the index")
        return data

    def decode(
        self, i: int, window: tuple[int, int, int, int] | None, memory: PixelMemory | None
    ) -> np.ndarray:
        """uint8 RGB (h, w, 3); see ``SampleStore.decode``."""
        data = self.view_checked(i)
        height, width = self.sizes.item(i, 0), self.sizes.item(i, 1)
        x0, y0, x1, y1 = window = window or (0, 0, width, height)
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise ValueError(
                f"window {window} is empty or leaves {self.key(i)}, {width} x {height}"
            )
        room = None if memory is None else memory.room(3 * height * width)
        try:
            code = self.formats.item(i)
            if code != JPEG:
                image = self._decode_lossless(code, data, window)
            elif self.intervals.item(i) and jpeg_windows.spares_pixels((height, width), window):
                image = jpeg_windows.decode_window(data, window, room)
            else:
                image = decode_jpeg(data, "RGB", room)[y0:y1, x0:x1]
        except ValueError as error:
            raise self.damaged(i, str(error)) from error
        if image.shape != (y1 - y0, x1 - x0, 3):
            raise self.damaged(i, "does not decode to the size in the index")
        return image

    @staticmethod
    def _decode_lossless(
        code: int, data: memoryview, window: tuple[int, int, int, int]
    ) -> np.ndarray:
        if code == PNG:
            x0, y0, x1, y1 = window
            return jpeg_windows.decode_png(data)[y0:y1, x0:x1]
        return decode_netpbm(data, window)

    def key(self, i: int) -> str:
        """Name of the sample, without suffix."""
        record = self.index[i]
        return sample_key(int(record["class"]), int(record["image_id"]), int(record["serial"]))

    def damaged(self, i: int, reason: str) -> DamagedSampleError:
        """The error that names shard, key and ``reason``."""
        shard = self.header["shards"][self.shard_numbers.item(i)]["name"]
        return DamagedSampleError(f"{self.path / shard}: sample {self.key(i)}: {reason}")

    def __getstate__(self) -> dict:
        return {"path": self.path, "header": self.header, "identity": self.identity}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.check_unchanged()
        self._open()


def find_parts(path: Path) -> list[Path]:
    """The folders of one store: itself, or its parts where several machines wrote it.

    Raises:
        StoreError: some of the parts are missing.
    """
    found = {}
    if not (path / HEADER_NAME).exists():
        for part in path.glob("part-*-of-*"):
            numbers = part.name.split("-")[1::2]
            if len(numbers) == 2 and all(n.isdigit() for n in numbers):
                found[int(numbers[0]), int(numbers[1])] = part
    if not found:
        return [path]
    counts = {n for _, n in found}
    missing = [part_name(i, max(counts)) for i in range(1, max(counts) + 1)]
    missing = [name for name in missing if not (path / name).is_dir()]
    if len(counts) > 1 or missing:
        raise StoreError(
            f"{path} holds {', '.join(sorted(p.name for p in found.values()))}; "
            + (f"missing: {', '.join(missing)}" if len(counts) == 1 else "parts of several splits")
        )
    return [found[key] for key in sorted(found)]


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
        """The encoded sample: a whole ordinary JPEG or PNG, not checked."""
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

"""One folder of a sample store, read where it lies mapped; ``sample_store`` joins several."""

import mmap
import os
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

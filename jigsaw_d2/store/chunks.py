"""Samples on their way to the disk: encoded, with tar members and index records around them."""

import os
from typing import NamedTuple

import numpy as np

from jigsaw_d2.data.samples import group_codes
from jigsaw_d2.store import jpeg_windows
from jigsaw_d2.store.format import (
    BLOCK,
    JPEG,
    PGM,
    PNG,
    PPM,
    RECORD,
    SUFFIXES,
    crc32,
    sample_key,
    tar_header,
    tar_padding,
)
from jigsaw_d2.store.netpbm import encode_netpbm

DEFAULT_QUALITY = 95
ENCODINGS = ("jpeg", "png", "ppm")
# Bytes gathered before they are parked: less than what malloc gives back to the system and then has
# to fault in anew, page by page, for every chunk.
PARKED_AT_ONCE = 64 << 10


class Parked(NamedTuple):
    """The first ``size`` bytes of an open file, where another process left them."""

    descriptor: int
    size: int


class Chunk(NamedTuple):
    """Samples ready to be appended: tar members, and their records with offsets from 0."""

    members: bytes | Parked
    records: np.ndarray  # RECORD (n,); "shard" not yet filled

    @property
    def size(self) -> int:
        """Bytes of the members."""
        return self.members.size if isinstance(self.members, Parked) else len(self.members)

    def write(self, descriptor: int) -> None:
        """Write the members at the file's position."""
        if not isinstance(self.members, Parked):
            return _write_all(descriptor, self.members)
        done, (source, size) = 0, self.members
        while done < size:
            done += os.sendfile(descriptor, source, done, size - done)


def _write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


class ChunkBuilder:
    """Collects encoded samples into one ``Chunk``; made in a worker, appended by the writer.

    Args:
        class_files: follow each sample by a ``.cls`` member, for WebDataset readers that want one.
            Off by default: a tar member of one digit takes 1,024 bytes, and the class is in the
            key (and the index) anyway.
        descriptor: a file to park the members in, from its beginning on; None = keep them. A parked
            chunk is light to hand to a process that has the file open, too, and needs fresh memory
            for a few samples only.
    """

    def __init__(self, class_files: bool = False, descriptor: int | None = None) -> None:
        self.class_files = class_files
        self._descriptor = descriptor
        self._parts: list[bytes] = []
        self._rows: list[tuple] = []
        self._size = self._parked = 0
        if descriptor is not None:
            os.lseek(descriptor, 0, os.SEEK_SET)

    def add(
        self,
        encoded: bytes,
        *,
        class_index: int,
        size: tuple[int, int],
        image_id: int,
        serial: int,
        box: np.ndarray,
        gt_box: np.ndarray,
        interval: int = 0,
        code: int = JPEG,
    ) -> None:
        """Add one sample; the fields are those of ``store.format.RECORD``."""
        key = sample_key(class_index, image_id, serial)
        offset, length, crc = self._size + BLOCK, len(encoded), crc32(encoded)
        row = (offset, image_id, class_index, box, gt_box, size)
        self._rows.append((*row, length, crc, 0, serial, interval, 0, code))
        self._add_member(f"{key}.{SUFFIXES[code]}", encoded)
        if self.class_files:
            self._add_member(f"{key}.cls", str(class_index).encode())
        if self._descriptor is not None and self._size - self._parked >= PARKED_AT_ONCE:
            self._park()

    def _add_member(self, name: str, content: bytes) -> None:
        length = len(content)
        padding = tar_padding(length)
        self._parts += (tar_header(name, length), content, padding)
        self._size += BLOCK + length + len(padding)

    def _park(self) -> None:
        _write_all(self._descriptor, b"".join(self._parts))
        self._parts, self._parked = [], self._size

    def build(self) -> Chunk:
        """All that was added so far; the last call."""
        records = np.zeros(len(self._rows), RECORD)
        for field, column in zip(RECORD.names, zip(*self._rows)):
            records[field] = column
        records["group"] = group_codes(records["size"][:, 1], records["size"][:, 0])
        if self._descriptor is None:
            return Chunk(b"".join(self._parts), records)
        self._park()
        return Chunk(Parked(self._descriptor, self._size), records)


def encode_sample(
    image: np.ndarray,
    *,
    quality: int = DEFAULT_QUALITY,
    encoding: str = "jpeg",
    windows: bool = False,
) -> tuple[bytes, int, int]:
    """(bytes, restart interval, format code) of uint8 BGR (h, w, 3) or grey (h, w).

    Args:
        quality: of a JPEG.
        encoding: one of ``ENCODINGS``.
        windows: write a JPEG of which windows decode alone; those of the others do anyway.
    """
    if encoding == "png":
        return jpeg_windows.encode_png(image), 0, PNG
    if encoding == "ppm":
        return encode_netpbm(image), 0, PGM if image.ndim == 2 else PPM
    encoded, interval = jpeg_windows.encode_jpeg(image, quality, windows)
    return encoded, interval, JPEG

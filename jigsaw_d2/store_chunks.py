"""Samples on their way to the disk: encoded, with tar members and index records around them."""

import zlib
from typing import NamedTuple

import numpy as np

from jigsaw_d2 import jpeg_windows
from jigsaw_d2.samples import group_codes
from jigsaw_d2.store_format import (
    BLOCK,
    JPEG,
    PNG,
    RECORD,
    SUFFIXES,
    sample_key,
    tar_header,
    tar_padding,
)

DEFAULT_QUALITY = 95


class Chunk(NamedTuple):
    """Samples ready to be appended: tar members, and their records with offsets from 0."""

    members: bytes
    records: np.ndarray  # RECORD (n,); "shard" not yet filled


class ChunkBuilder:
    """Collects encoded samples into one ``Chunk``; made in a worker, appended by the writer.

    Args:
        class_files: follow each sample by a ``.cls`` member, for WebDataset readers that want one.
            Off by default: a tar member of one digit takes 1,024 bytes, and the class is in the
            key (and the index) anyway.
    """

    def __init__(self, class_files: bool = False) -> None:
        self.class_files = class_files
        self._parts: list[bytes] = []
        self._rows: list[tuple] = []
        self._size = 0

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
        """Add one sample; the fields are those of ``store_format.RECORD``."""
        key = sample_key(class_index, image_id, serial)
        offset, length, crc = self._size + BLOCK, len(encoded), zlib.crc32(encoded)
        row = (offset, image_id, class_index, tuple(box), tuple(gt_box), size)
        self._rows.append((*row, length, crc, 0, serial, interval, 0, code))
        self._add_member(f"{key}.{SUFFIXES[code]}", encoded)
        if self.class_files:
            self._add_member(f"{key}.cls", str(class_index).encode())

    def _add_member(self, name: str, content: bytes) -> None:
        parts = (tar_header(name, len(content)), content, tar_padding(len(content)))
        self._parts += parts
        self._size += sum(map(len, parts))

    def build(self) -> Chunk:
        """All that was added so far."""
        records = np.array(self._rows, RECORD)
        records["group"] = group_codes(records["size"][:, 1], records["size"][:, 0])
        return Chunk(b"".join(self._parts), records)


def encode_sample(
    image: np.ndarray, *, quality: int = DEFAULT_QUALITY, png: bool = False, windows: bool = False
) -> tuple[bytes, int, int]:
    """(bytes, restart interval, format code) of uint8 BGR (h, w, 3) or grey (h, w)."""
    if png:
        return jpeg_windows.encode_png(image), 0, PNG
    encoded, interval = jpeg_windows.encode_jpeg(image, quality, windows)
    return encoded, interval, JPEG

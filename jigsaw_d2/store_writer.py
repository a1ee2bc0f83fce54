"""Write a sample store: shards first, then the index, then the header, then the final name."""

import json
import os
import shutil
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jigsaw_d2 import jpeg_windows
from jigsaw_d2.errors import JigsawError
from jigsaw_d2.samples import group_codes
from jigsaw_d2.store_format import (
    FORMAT,
    HEADER_NAME,
    INDEX_NAME,
    JPEG,
    PNG,
    RECORD,
    SUFFIXES,
    VERSION,
    StoreError,
    fingerprint,
    hash_image_ids,
    sample_key,
    shard_name,
    tar_header,
    tar_padding,
)

DEFAULT_QUALITY = 95
DEFAULT_SHARD_SIZE = 256 << 20
END_OF_ARCHIVE = bytes(1024)


class StoreWriteError(JigsawError, OSError):
    """The disk does not take the store: full, unwritable, or gone."""


class Chunk(NamedTuple):
    """Samples ready to be appended: tar members, and their records with offsets from 0."""

    members: bytes
    records: np.ndarray  # RECORD (n,); "shard" not yet filled


class ChunkBuilder:
    """Collects encoded samples into one ``Chunk``; made in a worker, appended by the writer."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._records: list[np.ndarray] = []
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
        format: int = JPEG,
    ) -> None:
        """Add one sample; the fields are those of ``store_format.RECORD``."""
        name = f"{sample_key(class_index, image_id, serial)}.{SUFFIXES[format]}"
        record = np.zeros((), RECORD)
        record["offset"] = self._size + 512
        record["length"], record["crc32"] = len(encoded), zlib.crc32(encoded)
        record["class"], record["image_id"], record["serial"] = class_index, image_id, serial
        record["box"], record["gt_box"] = box, gt_box
        record["size"], record["interval"], record["format"] = size, interval, format
        record["group"] = group_codes(size[1], size[0])
        parts = (tar_header(name, len(encoded)), encoded, tar_padding(len(encoded)))
        self._parts += parts
        self._records.append(record)
        self._size += sum(map(len, parts))

    def build(self) -> Chunk:
        """All that was added so far."""
        records = np.array(self._records, RECORD) if self._records else np.zeros(0, RECORD)
        return Chunk(b"".join(self._parts), records)


def encode_sample(
    image: np.ndarray, *, quality: int = DEFAULT_QUALITY, png: bool = False, windows: bool = False
) -> tuple[bytes, int, int]:
    """(bytes, restart interval, format code) of uint8 RGB (h, w, 3) or grey (h, w)."""
    if png:
        return jpeg_windows.encode_png(image), 0, PNG
    encoded, interval = jpeg_windows.encode_jpeg(image, quality, windows)
    return encoded, interval, JPEG


class StoreWriter:
    """Writes under ``<path>.partial`` and renames when whole; use as a context manager.

    Leaving the block without ``finish`` leaves no store behind.

    Args:
        path: folder of the finished store.
        categories: names without background, in class order.
        shard_size: bytes after which the next chunk begins a new shard.
        header: further entries of the header (seed, options, source, report ...).
        overwrite: replace an existing store once the new one is whole.

    Raises:
        StoreError: ``path`` exists and ``overwrite`` is off.
        StoreWriteError: the disk refuses.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        categories: list[str],
        *,
        shard_size: int = DEFAULT_SHARD_SIZE,
        header: dict | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.categories = list(categories)
        self.shard_size = shard_size
        self.header = dict(header or {})
        self.overwrite = overwrite
        self.shards: list[dict] = []
        self.records: list[np.ndarray] = []
        self._file = None
        if self.path.exists() and not overwrite:
            raise StoreError(f"{self.path} exists; --overwrite replaces it, or choose another folder")
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)

    def add(
        self,
        image: np.ndarray,
        class_index: int,
        *,
        image_id: int,
        serial: int = 0,
        box: np.ndarray | None = None,
        gt_box: np.ndarray | None = None,
        quality: int = DEFAULT_QUALITY,
        png: bool = False,
        windows: bool = False,
    ) -> None:
        """Encode and append one sample, uint8 RGB (h, w, 3); boxes default to the whole of it."""
        height, width = image.shape[:2]
        box = np.array([0, 0, width, height], np.float32) if box is None else box
        encoded, interval, code = encode_sample(image, quality=quality, png=png, windows=windows)
        builder = ChunkBuilder()
        builder.add(
            encoded,
            class_index=class_index,
            size=(height, width),
            image_id=image_id,
            serial=serial,
            box=box,
            gt_box=box if gt_box is None else gt_box,
            interval=interval,
            format=code,
        )
        self.append(builder.build())

    def append(self, chunk: Chunk) -> None:
        """Write a chunk behind what is there; begins a new shard where it would not fit."""
        if self._file is not None and self._file.tell() + len(chunk.members) > self.shard_size:
            self._close_shard()
        if self._file is None:
            self._file = open(self.partial / shard_name(len(self.shards)), "wb")
            self.shards.append({"name": shard_name(len(self.shards)), "samples": 0, "bytes": 0})
        records = chunk.records.copy()
        records["offset"] += self._file.tell()
        records["shard"] = len(self.shards) - 1
        self._file.write(chunk.members)
        self.records.append(records)
        self.shards[-1]["samples"] += len(records)

    def _close_shard(self) -> None:
        self._file.write(END_OF_ARCHIVE)
        self.shards[-1]["bytes"] = self._file.tell()
        self._file.close()
        self._file = None

    def finish(self, report: dict | None = None) -> None:
        """Write index and header, and give the store its name."""
        if self._file is not None:
            self._close_shard()
        index = np.concatenate([np.zeros(0, RECORD), *self.records])
        np.save(self.partial / INDEX_NAME, index)
        header = {
            "format": FORMAT,
            "version": VERSION,
            "categories": self.categories,
            "samples": len(index),
            "shards": self.shards,
            "fingerprint": fingerprint(self.categories, index),
            "image_ids_sha256": hash_image_ids(index["image_id"]),
            **self.header,
            "report": report or {},
        }
        (self.partial / HEADER_NAME).write_text(json.dumps(header, indent=1))
        if self.path.exists():
            shutil.rmtree(self.path)
        os.replace(self.partial, self.path)

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

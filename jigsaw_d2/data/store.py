"""Read and verify a sample store: memory-mapped, opened in the same time whatever its size.

``store_writer`` writes one; ``store_format`` has what its files hold. Worker processes share the
pages of index and shards: nothing per sample lives in Python objects.
"""

import io
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from jigsaw_d2.data import jpeg_windows
from jigsaw_d2.data.store_format import (
    BLOCK,
    INDEX_NAME,
    NPY,
    PGM,
    PNG,
    PPM,
    RECORD,
    SUFFIXES,
    crc32,
    decode_netpbm,
    find_parts,
    fingerprint,
    read_header,
    sample_key,
    tar_header,
)
from jigsaw_d2.io import DataError

Window = tuple[int, int, int, int]  # XYXY ints, pixels of the sample, half-open


class DamagedSampleError(DataError):
    """One sample whose bytes are not those that were written; the loader shows another instead."""


class SampleStore:
    """Samples of one store, or of several parts of one, numbered 0 .. len - 1.

    Picklable, and safe to share over fork. All arrays are read-only.

    Attributes:
        paths, headers: of each part; ``header`` and ``categories`` are those of the first.
        index: RECORD (n,); of a single part the mapped file itself. "shard" counts over all parts.
        channels, dtype: of the samples as decoded; 3 and uint8, or those of a store of arrays.
        classes: int64 (n,), index into ``categories``; background = len(categories).
        groups: uint8 (n,), index into ``samples.GROUPS``.
        sizes: int32 (n, 2), (height, width) of the sample as shown.
        image_ids: int64 (n,) of the source images.
        boxes: float32 (n, 4) XYXY cut from the source image, source pixels, integral.
        gt_boxes: float32 (n, 4) XYXY annotated box inside it, source pixels; negatives: = boxes.

    Raises:
        DataError: no whole store there, another format version, or parts that do not match.
    """

    def __init__(self, path: str | os.PathLike | Sequence[str | os.PathLike]) -> None:
        paths = [path] if isinstance(path, (str, os.PathLike)) else path
        folders = [find_parts(Path(p)) for p in paths]
        self.paths = [part for parts in folders for part in parts]
        if not self.paths:
            raise DataError("no sample store named; give at least one folder")
        self.headers = [read_header(p) for p in self.paths]
        for path, header in zip(self.paths, self.headers):
            if header["categories"] != self.headers[0]["categories"]:
                raise DataError(f"{path} has other categories than {self.paths[0]}")
            if any(header.get(k) != self.headers[0].get(k) for k in ("channels", "dtype")):
                raise DataError(f"{path} has other channels or numbers than {self.paths[0]}")
        told = ("annotations_sha256", "seed", "options")
        origins = {p: [h.get(k) for k in told] for p, h in zip(self.paths, self.headers)}
        for first, *others in folders:
            for path in others:
                if origins[path] != origins[first]:
                    raise DataError(
                        f"{path} and {first} are no parts of one store: they were extracted from "
                        "other sets or with other settings; extract them again, into a new folder"
                    )
        self._identities = [_identity(p) for p in self.paths]
        self._open()

    def _open(self) -> None:
        self.header = self.headers[0]
        self.categories: list[str] = self.header["categories"]
        self.channels: int = self.header.get("channels", 3)
        self.dtype = np.dtype(self.header.get("dtype", "uint8"))
        parts, self._files = [], []
        for path, header in zip(self.paths, self.headers):
            index = _read_index(path, header)
            if self._files:
                index = index.copy()
                index["shard"] += len(self._files)
            parts.append(index)
            self._files += [path / shard["name"] for shard in header["shards"]]
        self.index = parts[0] if len(parts) == 1 else np.concatenate(parts)
        self.index.flags.writeable = False
        # Views of the columns, which cost more to make than a number of one costs to read.
        self._column = column = {name: self.index[name] for name in RECORD.names}
        self.classes, self.groups, self.sizes = column["class"], column["group"], column["size"]
        self.image_ids, self.boxes = column["image_id"], column["box"]
        self.gt_boxes = column["gt_box"]
        self._shards: list[mmap.mmap | None] = [None] * len(self._files)

    @property
    def fingerprint(self) -> str:
        """Changes whenever the content does."""
        return "+".join(header["fingerprint"] for header in self.headers)

    def check_unchanged(self) -> None:
        """Raises DataError unless every part on disk is the one that was opened."""
        for path, identity in zip(self.paths, self._identities):
            if _identity(path) != identity:
                raise DataError(f"{path} was replaced since it was opened; start again")

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> bytes:
        """The encoded sample: a whole ordinary JPEG, PNG, PPM or PGM, not checked."""
        return bytes(self.view(i))

    def key(self, i: int) -> str:
        """Name of sample ``i`` within its shard, without suffix."""
        return sample_key(*(self._column[name].item(i) for name in ("class", "image_id", "serial")))

    def shard(self, number: int) -> mmap.mmap:
        """The bytes of one shard, mapped when first read."""
        mapped = self._shards[number]
        if mapped is None:
            self.check_unchanged()
            try:
                with open(self._files[number], "rb") as stream:
                    mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise DataError(f"{self._files[number]} cannot be opened: {error}") from error
            self._shards[number] = mapped
        return mapped

    def view(self, i: int, check: bool = False) -> memoryview:
        """The encoded sample where it is mapped.

        ``check``: raise DamagedSampleError unless its CRC-32 is that of the index.
        """
        column = self._column
        if not 0 <= i < len(self.index):
            raise IndexError(f"sample {i} of a store of {len(self)}")
        start, mapped = column["offset"].item(i), self.shard(column["shard"].item(i))
        data = memoryview(mapped)[start : start + column["length"].item(i)]
        if check and crc32(data) != column["crc32"].item(i):
            raise self.damaged(i, "its CRC-32 differs from the index")
        return data

    def decode(self, i: int, window: Window | None = None) -> np.ndarray:
        """uint8 RGB (h, w, 3) of sample ``i``, or of ``window`` (XYXY ints, sample pixels).

        Of a store of arrays (h, w, ``channels``), of ``dtype``.

        Of a JPEG written for windows only the pieces under it are decoded; the pixels are those of
        the full decode. May be a view, of a larger array or, read-only, of the mapped shard.

        Raises:
            DamagedSampleError: naming shard, key and reason.
            ValueError: an empty window or one that leaves the sample.
        """
        data, column = self.view(i, check=True), self._column
        height, width = column["size"].item(i, 0), column["size"].item(i, 1)
        x0, y0, x1, y1 = window = window or (0, 0, width, height)
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise ValueError(f"window {window} is empty or leaves sample {i}, {width} x {height}")
        code = column["format"].item(i)
        try:
            if code in (PPM, PGM):
                image = decode_netpbm(data, code == PGM, height, width)[y0:y1, x0:x1]
                if code == PGM:
                    image = cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
            elif code == NPY:
                image = np.load(io.BytesIO(data), allow_pickle=False)
                if image.shape[:2] != (height, width) or image.dtype != self.dtype:
                    raise ValueError("is another array than the index says")
                image = image[y0:y1, x0:x1]
            elif code == PNG:
                image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))[y0:y1, x0:x1]
            else:
                image = jpeg_windows.decode_window(data, window)
        except (ValueError, OSError) as error:  # the latter by Pillow
            raise self.damaged(i, str(error)) from error
        if image.shape != (y1 - y0, x1 - x0, self.channels):
            raise self.damaged(i, "does not decode to the size in the index")
        return image

    def damaged(self, i: int, reason: str) -> DamagedSampleError:
        """The error that names shard, key and ``reason``."""
        file = self._files[self._column["shard"].item(i)]
        return DamagedSampleError(f"{file}: sample {self.key(i)}: {reason}")

    def __getstate__(self) -> dict:
        return {name: vars(self)[name] for name in ("paths", "headers", "_identities")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.check_unchanged()
        self._open()


def _identity(path: Path) -> tuple[int, int, int]:
    """Differs once the store at ``path`` was replaced."""
    try:
        stat = os.stat(path / INDEX_NAME)
    except OSError as error:
        raise DataError(f"{path / INDEX_NAME} is gone: {error.strerror}") from error
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _read_index(path: Path, header: dict) -> np.ndarray:
    file = path / INDEX_NAME
    try:
        index = np.load(file, mmap_mode="r").view(np.ndarray)
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as an index: {error}") from error
    if index.dtype != RECORD or len(index) != header["samples"]:
        raise DataError(f"{file} does not belong to the header beside it")
    return index


def check_store(
    store: SampleStore, decode: bool = False, progress: Callable[[int], object] = lambda n: None
) -> Iterator[str]:
    """Compare every byte with the index; each fault as a sentence that names its place.

    ``decode``: decode each sample too. ``progress`` is called with 1 after each.
    """
    for path, header in zip(store.paths, store.headers):
        if fingerprint(header["categories"], _read_index(path, header)) != header["fingerprint"]:
            yield f"{path}: the index differs from the fingerprint in the header"
    shards = [shard for header in store.headers for shard in header["shards"]]
    for number, shard in enumerate(shards):
        numbers = np.flatnonzero(store.index["shard"] == number).tolist()
        try:
            found = f"{len(store.shard(number))} bytes, in the index {len(numbers)} samples"
        except DataError as error:
            yield str(error)
            continue
        written = f"{shard['bytes']} bytes, in the index {shard['samples']} samples"
        if found != written:
            yield f"{shard['name']} holds {found}; it was written with {written}"
        for i in numbers:
            progress(1)
            try:
                _check_sample(store, i)
                if decode:
                    store.decode(i)
            except DamagedSampleError as error:
                yield str(error)


def _check_sample(store: SampleStore, i: int) -> None:
    record = store.index[i]
    offset, length = int(record["offset"]), int(record["length"])
    shard = store.shard(int(record["shard"]))
    if offset < BLOCK or offset + length > len(shard):
        raise store.damaged(i, "lies outside the shard")
    store.view(i, check=True)
    header = tar_header(f"{store.key(i)}.{SUFFIXES[record['format']]}", length)
    if shard[offset - BLOCK : offset] != header:
        raise store.damaged(i, "its tar header is damaged")

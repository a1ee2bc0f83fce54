"""The files of a sample store, for those who write and read them.

header.json        format version, categories, seed, options, source, report, fingerprint
index.npy          one ``RECORD`` per sample; ``numpy.load(..., mmap_mode="r")`` opens it
shard-00000.tar    samples as ``<class>/<image id>_<serial>.jpg`` (or another of ``SUFFIXES``):
                   WebDataset keys, and an ImageFolder tree once unpacked
"""

import hashlib
import io
import json
import math
import tarfile
from pathlib import Path

import cv2
import numpy as np
from zlib_ng import zlib_ng

from jigsaw_d2.data import jpeg_windows
from jigsaw_d2.io import DataError

FORMAT = "jigsaw-d2 sample store"
VERSION = 1
HEADER_NAME = "header.json"
INDEX_NAME = "index.npy"
PARTIAL_NAME = ".partial"  # within a mount point; elsewhere beside the store
BLOCK = 512  # bytes; tar headers and contents are multiples of it
# How a sample is encoded: ``format`` of its record, and the suffix of its member.
JPEG, PNG, PPM, PGM, NPY = range(5)
SUFFIXES = ("jpg", "png", "ppm", "pgm", "npy")  # the last: arrays of any number of channels
ENCODINGS = ("jpeg", "png", "ppm")
DEFAULT_QUALITY = 95
NETPBM_HEAD = b"P%d\n%d %d\n255\n"  # 6 = colour, 5 = grey; width, height
# That of the standard library takes ten times as long: 4 % of what a Jigsaw image takes.
crc32 = zlib_ng.crc32

# 80 bytes a sample, every field aligned to its size. Multi-byte fields are little-endian.
RECORD = np.dtype(
    [
        ("offset", "<i8"),  # first byte of the encoded sample in its shard
        ("image_id", "<i8"),
        ("class", "<i8"),  # index into the categories; background = their number
        ("box", "<f4", (4,)),  # XYXY cut from the source image, source pixels, integral
        ("gt_box", "<f4", (4,)),  # XYXY annotated box clipped to the image; negatives: = box
        ("size", "<i4", (2,)),  # (height, width)
        ("length", "<u4"),  # bytes of the encoded sample
        ("crc32", "<u4"),  # of the encoded sample
        ("shard", "<u2"),
        ("serial", "<u2"),  # number of the sample within its image
        ("interval", "<u2"),  # MCUs per restart interval; 0 = only the whole decodes
        ("group", "u1"),  # index into samples.GROUPS
        ("format", "u1"),  # index into SUFFIXES
    ]
)


def sample_key(class_index: int, image_id: int, serial: int) -> str:
    """Name of a sample within the shards, without suffix; unique in a store and its parts.

    The class is the folder: an unpacked shard is an ImageFolder tree, its folders in class order.
    """
    return f"{class_index:04d}/{image_id}_{serial:03d}"


def tar_header(name: str, size: int) -> bytes:
    """One 512-byte ustar header of a regular file; nothing in it depends on clock or user."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def fingerprint(categories: list[str], index: np.ndarray) -> str:
    """SHA-256 over the categories and all records (shape (n,)), which hold every CRC-32."""
    digest = hashlib.sha256(json.dumps([FORMAT, VERSION, categories]).encode())
    digest.update(memoryview(np.ascontiguousarray(index)).cast("B"))
    return digest.hexdigest()


def hash_image_ids(image_ids: np.ndarray) -> str:
    """SHA-256 over the sorted distinct ids of source images, shape (n,): what a store saw."""
    return hashlib.sha256(np.unique(image_ids).astype("<i8").tobytes()).hexdigest()


def encode_sample(
    image: np.ndarray,
    *,
    quality: int | None = DEFAULT_QUALITY,
    encoding: str = "jpeg",
    windows: bool = False,
) -> tuple[bytes, int, int]:
    """(bytes, restart interval, format code) of uint8 BGR (h, w, 3) or grey (h, w).

    PPM (of grey samples PGM) is about ten times the bytes, but has nothing to decode: a window is a
    view of the mapped file. ``windows``: write a JPEG of which windows decode alone. Encoding "npy"
    is for an array (h, w, C) of any kind.
    """
    if encoding == "npy":
        stream = io.BytesIO()
        np.save(stream, np.ascontiguousarray(image))
        return stream.getvalue(), 0, NPY
    if encoding == "png":
        return cv2.imencode(".png", image)[1].tobytes(), 0, PNG
    if encoding == "ppm":
        grey = image.ndim == 2
        pixels = image if grey else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        head = NETPBM_HEAD % (5 if grey else 6, image.shape[1], image.shape[0])
        return head + pixels.tobytes(), 0, PGM if grey else PPM
    return *jpeg_windows.encode_jpeg(image, quality, windows), JPEG


def decode_netpbm(data: bytes | memoryview, grey: bool, height: int, width: int) -> np.ndarray:
    """uint8 (height, width, 3) or (height, width) that ``encode_sample`` wrote: a read-only view.

    Raises ValueError where it is of another form or size.
    """
    head = NETPBM_HEAD % (5 if grey else 6, width, height)
    shape = (height, width) if grey else (height, width, 3)
    if data[: len(head)] != head or len(data) != len(head) + math.prod(shape):
        raise ValueError(f"does not decode to the size in the index, {width} x {height}")
    return np.frombuffer(data, np.uint8, offset=len(head)).reshape(shape)


def read_header(path: Path) -> dict:
    """The header of the store at ``path``.

    Raises DataError: no store there, not readable, or of another format version (both are named).
    """
    file = path / HEADER_NAME
    if not file.exists():
        raise DataError(
            f"{path} is no whole sample store: it has no {HEADER_NAME}; "
            "write one with extract_samples.py (an interrupted one resumes by the same command)"
        )
    try:
        header = json.loads(file.read_bytes())
        known = header["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise DataError(f"{file} is not the header of a {FORMAT}; extract the samples again")
    if header.get("version") != VERSION:
        raise DataError(
            f"{path} has store format version {header.get('version')}, this program reads version "
            f"{VERSION}; extract the samples again"
        )
    return header


def find_parts(path: Path) -> list[Path]:
    """The folders of one store: itself, or its parts where several machines wrote it.

    Raises DataError where some of the parts are missing, or another store is there.
    """
    found = sorted(part.name for part in path.glob("part-*-of-*[0-9]"))
    whole = (path / HEADER_NAME).exists()
    if whole and found:
        raise DataError(f"{path} holds a whole store and {', '.join(found)}: move one of them away")
    if not found:
        return [path]
    count = int(found[0].rsplit("-", 1)[1])
    wanted = [f"part-{n}-of-{count}" for n in range(1, count + 1)]
    if sorted(wanted) != found:
        missing = ", ".join(name for name in wanted if name not in found) or "none"
        raise DataError(f"{path} holds {', '.join(found)}; of {count} parts are missing: {missing}")
    return [path / name for name in wanted]

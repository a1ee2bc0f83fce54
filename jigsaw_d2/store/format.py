"""The bytes of a sample store: header, index records, tar members. Shared by writer and reader.

A store is a folder:

    header.json        format version, categories, seed, options, source, report, fingerprint
    index.npy          one ``RECORD`` per sample; ``numpy.load(..., mmap_mode="r")`` opens it
    shard-00000.tar    samples as ``<class>/<image id>_<serial>.jpg`` (or another of ``SUFFIXES``):
                       WebDataset keys, and an ImageFolder tree once unpacked
"""

import hashlib
import json
from pathlib import Path

import numpy as np
from zlib_ng import zlib_ng

from jigsaw_d2.errors import JigsawError

FORMAT = "jigsaw-d2 sample store"
VERSION = 1
HEADER_NAME = "header.json"
INDEX_NAME = "index.npy"
BLOCK = 512  # bytes; tar headers and contents are multiples of it
# How a sample is encoded: ``format`` of its record, and the suffix of its member.
JPEG, PNG, PPM, PGM = 0, 1, 2, 3
SUFFIXES = ("jpg", "png", "ppm", "pgm")
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


class StoreError(JigsawError, ValueError):
    """A sample store that cannot be opened or written as asked."""


class StoreGoneError(StoreError):
    """The store was removed or replaced after it was opened."""


class DamagedSampleError(StoreError):
    """One sample whose bytes are not those that were written."""


def shard_name(number: int) -> str:
    """File name of shard ``number``."""
    return f"shard-{number:05d}.tar"


def part_name(number: int, parts: int) -> str:
    """Folder of part ``number`` (from 1) of ``parts`` in a store written by several machines."""
    return f"part-{number}-of-{parts}"


def sample_key(class_index: int, image_id: int, serial: int) -> str:
    """Name of a sample within the shards, without suffix; unique in a store and its parts.

    The class is the folder, so that an unpacked shard is an ImageFolder tree whose sorted folder
    names are in class order.
    """
    return f"{class_index:04d}/{image_id}_{serial:03d}"


# What all tar headers share, around name, size and checksum: mode, owner, group; time; type, magic.
_TAR_OWNER = b"0000644\0" + b"0000000\0" * 2
_TAR_TIME = b"00000000000\0"
_TAR_REST = (b"0" + bytes(100) + b"ustar\00000").ljust(BLOCK - 156, b"\0")
# The checksum field counts as eight spaces.
_TAR_SUM = sum(_TAR_OWNER + _TAR_TIME + _TAR_REST) + 8 * ord(" ")


def tar_header(name: str, size: int) -> bytes:
    """One 512-byte ustar header of a regular file; nothing in it depends on clock or user.

    ``tarfile.TarInfo.tobuf`` gives the same bytes at many times the cost.

    Raises:
        StoreError: a name of more than 100 bytes.
    """
    encoded = name.encode()
    if len(encoded) > 100:
        raise StoreError(
            f"member name {name!r} has more than the 100 bytes that a tar header holds"
        )
    length = b"%011o\0" % size
    checksum = b"%06o\0 " % (_TAR_SUM + sum(encoded) + sum(length))
    return b"".join((encoded.ljust(100, b"\0"), _TAR_OWNER, length, _TAR_TIME, checksum, _TAR_REST))


def tar_padding(size: int) -> bytes:
    """Zero bytes that complete a member of ``size`` bytes to whole blocks."""
    return bytes(-size % BLOCK)


def fingerprint(categories: list[str], index: np.ndarray) -> str:
    """SHA-256 over the categories and all records (shape (n,)), which hold every CRC-32."""
    digest = hashlib.sha256(json.dumps([FORMAT, VERSION, categories]).encode())
    digest.update(memoryview(np.ascontiguousarray(index)).cast("B"))
    return digest.hexdigest()


def hash_image_ids(image_ids: np.ndarray) -> str:
    """SHA-256 over the sorted distinct ids of source images, shape (n,): what a store saw."""
    return hashlib.sha256(np.unique(image_ids).astype("<i8").tobytes()).hexdigest()


def read_header(path: Path) -> dict:
    """The header of the store at ``path``.

    Raises:
        StoreError: no store there, not readable, or of another format version (both are named).
    """
    file = path / HEADER_NAME
    try:
        header = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise StoreError(
            f"{path} is no whole sample store: it has no {HEADER_NAME}; "
            "write one with extract_samples.py (an interrupted one resumes by the same command)"
        ) from None
    except (OSError, ValueError) as error:
        raise StoreError(f"{file} cannot be read as a store header: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise StoreError(f"{file} is not the header of a {FORMAT}")
    if header.get("version") != VERSION:
        raise StoreError(
            f"{path} has store format version {header.get('version')}, this program reads version "
            f"{VERSION}; extract the samples again"
        )
    return header

"""Where the parts of a baseline JPEG lie, and the comment that lists its pieces.

A restart marker after every k MCUs (minimum coded units) makes each interval, a *piece*, decodable
on its own. A comment segment of ours holds the layout and the length of every piece, so that
nothing has to be parsed or searched for; any other reader skips it.
"""

import struct
from typing import NamedTuple

import numpy as np

SOS, DRI, COM = 0xDA, 0xDD, 0xFE
BASELINE_SOF = (0xC0, 0xC1)
# A JFIF file begins with SOI and an APP0 segment of fixed length; the comment comes right behind.
COMMENT_AT = 20
APP0_START = b"\xff\xe0\0\x10"
TABLE_MAGIC = b"jigsaw-d2 pieces\0"
# Marker and length of the comment, magic; the fields of ``JpegLayout``; then, uint16, where the
# scan begins and the length of every piece.
TABLE_HEAD = struct.Struct(">HH17sHHHBBH")


class JpegLayout(NamedTuple):
    """How one baseline JPEG is laid out; sizes in pixels."""

    sof: int  # offset of the height field in the frame header, bytes
    height: int
    width: int
    mcu_height: int
    mcu_width: int
    interval: int  # MCUs between restart markers, 0 = none


def parse_jpeg(data: bytes) -> tuple[JpegLayout, int]:
    """Walk the segments up to the first scan; (layout, offset of the first entropy-coded byte).

    Raises:
        ValueError: not a JPEG, or not one with a single baseline scan.
    """
    if data[:2] != b"\xff\xd8":
        raise ValueError("not a JPEG: it does not begin with FF D8")
    position, sof, interval = 2, 0, 0
    height = width = mcu_height = mcu_width = components = 0
    while position + 4 <= len(data):
        marker = data[position + 1]
        length = (data[position + 2] << 8) | data[position + 3]
        if data[position] != 0xFF or length < 2:
            break
        if marker in BASELINE_SOF:
            sof = position + 5
            height, width = (data[sof] << 8) | data[sof + 1], (data[sof + 2] << 8) | data[sof + 3]
            components = data[sof + 4]
            factors = data[sof + 6 : sof + 6 + 3 * components : 3]
            # A scan of one component is not interleaved: its MCU is one block, whatever factors.
            alone = components == 1
            mcu_width = 8 if alone else 8 * max(f >> 4 for f in factors)
            mcu_height = 8 if alone else 8 * max(f & 15 for f in factors)
        elif marker == DRI:
            interval = (data[position + 4] << 8) | data[position + 5]
        elif marker == SOS:
            if not sof or data[position + 4] != components:
                break
            scan = position + 2 + length
            return JpegLayout(sof, height, width, mcu_height, mcu_width, interval), scan
        position += 2 + length
    raise ValueError("not a JPEG with a single baseline scan")


def read_layout(data: bytes) -> tuple[JpegLayout, int]:
    """(layout, bytes of the comment that lists the pieces, 0 = none).

    Raises:
        ValueError: as ``parse_jpeg``.
    """
    if len(data) > COMMENT_AT + TABLE_HEAD.size:
        _, length, magic, *fields = TABLE_HEAD.unpack_from(data, COMMENT_AT)
        if magic == TABLE_MAGIC:
            return JpegLayout(*fields), length + 2
    return parse_jpeg(data)[0], 0


def read_pieces(data: bytes, comment: int, count: int) -> np.ndarray:
    """Where the scan begins, then the lengths of ``count`` pieces with their end markers.

    Args:
        comment: of ``read_layout``; without it the pieces are searched for.

    Returns:
        integers (count + 1,), bytes: piece n begins at the sum of the first n + 1.

    Raises:
        ValueError: the JPEG has other pieces.
    """
    if comment:
        return np.frombuffer(data, ">u2", count + 1, COMMENT_AT + TABLE_HEAD.size)
    scan = parse_jpeg(data)[1]
    ends = find_piece_ends(data, scan)
    if len(ends) != count:
        raise ValueError(f"its pieces are not the {count} that its size asks for")
    return np.diff(ends, prepend=(0, scan))


def find_piece_ends(data: bytes, scan: int) -> np.ndarray:
    """Offsets just behind every marker from ``scan`` on, int64 (n,).

    In entropy-coded bytes FF is followed by 00 except where a marker stands.
    """
    array = np.frombuffer(data, np.uint8, offset=scan)
    found = array[:-1] == 0xFF
    found &= array[1:] != 0
    return found.nonzero()[0] + (scan + 2)


def list_pieces(data: bytes, layout: JpegLayout, scan: int) -> bytes:
    """The JPEG with the comment that lists its pieces; as it is where a comment cannot hold them.

    Without it a window still decodes, at the cost of a search.

    Args:
        layout, scan: of ``data``, as ``parse_jpeg`` gives them.
    """
    ends = find_piece_ends(data, scan)
    length = TABLE_HEAD.size + 2 * (len(ends) + 1)
    if data[2:6] != APP0_START or scan + length > 0xFFFF:
        return data
    table = np.empty(len(ends) + 1, ">u2")
    table[0], table[1], table[2:] = scan + length, ends[0] - scan, ends[1:] - ends[:-1]
    head = TABLE_HEAD.pack(0xFF00 | COM, length - 2, TABLE_MAGIC, layout.sof + length, *layout[1:])
    return b"".join((data[:COMMENT_AT], head, table, memoryview(data)[COMMENT_AT:]))

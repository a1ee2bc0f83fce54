"""JPEG samples of which a window decodes without the rest.

A restart marker after every k MCUs (minimum coded units) makes each interval, a *piece*, decodable
on its own. Where k divides the MCUs of a row, a JPEG is a grid of pieces: a header with the
window's size, the window's pieces with their markers renumbered, and an end marker are a valid JPEG
of just that window. Chroma upsampling looks one chroma sample beyond a pixel, so pieces are chosen
with that margin and the decoded window equals the full decode bit for bit.

A comment segment of ours lists the layout and the length of every piece, so that nothing has to be
searched for; any other reader skips it. Windows are XYXY ints in pixels of the sample, half-open.
"""

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg

EOI = 0xD9
SOS, DRI, COM = 0xDA, 0xDD, 0xFE
BASELINE_SOF = (0xC0, 0xC1)
# A JFIF file begins with SOI and an APP0 segment of fixed length; the comment comes right behind.
COMMENT_AT = 20
APP0_START = b"\xff\xe0\0\x10"
TABLE_MAGIC = b"jigsaw-d2 pieces\0"
# Marker and length of the comment, magic; the fields of ``JpegLayout``; then, uint16, where the
# scan begins and the length of every piece.
TABLE_HEAD = struct.Struct(">HH17sHHHBBH")
# MCUs between restart markers of grey samples, whose MCUs are 8 pixels wide; best first. Colour has
# one after every MCU: the finest grid costs no decoding time and about 2 % of the bytes.
GREY_INTERVALS = (2, 3, 5)
# The markers that end pieces, in turn; as many as the windows of the usual templates need.
RESTARTS = np.tile(np.arange(0xD0, 0xD8, dtype=np.uint8), 64)
# Pixels of a cut's rows at least: chroma of less than 3 samples a row is not interpolated.
MIN_WIDTH = 5
# Pixels that a window must spare for cutting it out to pay: what decodes in the time of a cut.
MIN_SPARED_PIXELS = 3000


class JpegLayout(NamedTuple):
    """How one baseline JPEG is laid out; sizes in pixels."""

    sof: int  # offset of the height field in the frame header, bytes
    height: int
    width: int
    mcu_height: int
    mcu_width: int
    interval: int  # MCUs between restart markers, 0 = none


def decode_jpeg(data: bytes | memoryview | np.ndarray, colour: str = "RGB") -> np.ndarray:
    """uint8 (h, w, 3) of a whole JPEG, not turned by its EXIF orientation; of "GRAY" (h, w).

    Args:
        data: of one JPEG; as an array uint8 (n,).
        colour: "RGB", "BGR" or "GRAY", whatever the JPEG itself has.

    Raises:
        ValueError: not a JPEG, or a damaged or truncated one.
    """
    pixels = simplejpeg.decode_jpeg(data, colour, strict=True)
    return pixels[..., 0] if colour == "GRAY" else pixels


def encode_jpeg(image: np.ndarray, quality: int, windows: bool = False) -> tuple[bytes, int]:
    """(JPEG, restart interval in MCUs or 0) of uint8 BGR (h, w, 3) or grey (h, w); chroma 4:2:0.

    ``windows``: write restart markers and the comment that lists the pieces.
    """
    interval = choose_interval(image.shape[1], image.ndim == 2) if windows else 0
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_RST_INTERVAL, interval]
    data = cv2.imencode(".jpg", image, options)[1].tobytes()
    return (_list_pieces(data) if interval else data), interval


def choose_interval(width: int, grey: bool) -> int:
    """MCUs between restart markers for a sample of ``width`` pixels; divides its MCUs per row."""
    if not grey:
        return 1
    columns = -(-width // 8)
    return next((k for k in GREY_INTERVALS if columns % k == 0), 1)


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
            height, width, components = struct.unpack_from(">HHB", data, sof)
            factors = data[sof + 6 : sof + 6 + 3 * components : 3]
            # A scan of one component is not interleaved: its MCU is one block, whatever factors.
            mcu_width = 8 * max(f >> 4 for f in factors) if components > 1 else 8
            mcu_height = 8 * max(f & 15 for f in factors) if components > 1 else 8
        elif marker == DRI:
            interval = (data[position + 4] << 8) | data[position + 5]
        elif marker == SOS:
            if not sof or data[position + 4] != components:
                break
            scan = position + 2 + length
            return JpegLayout(sof, height, width, mcu_height, mcu_width, interval), scan
        position += 2 + length
    raise ValueError("not a JPEG with a single baseline scan")


def _find_piece_ends(data: bytes, scan: int) -> np.ndarray:
    """Offsets just behind every marker from ``scan`` on, int64 (n,).

    In entropy-coded bytes FF is followed by 00 except where a marker stands.
    """
    array = np.frombuffer(data, np.uint8, offset=scan)
    found = (array[:-1] == 0xFF).nonzero()[0]
    return found[array[found + 1] != 0] + (scan + 2)


def _list_pieces(data: bytes) -> bytes:
    """The JPEG with the comment that lists its pieces; as it is where a comment cannot hold them.

    Without it a window still decodes, at the cost of a search.
    """
    layout, scan = parse_jpeg(data)
    ends = _find_piece_ends(data, scan)
    length = TABLE_HEAD.size + 2 * (len(ends) + 1)
    if data[2:6] != APP0_START or scan + length > 0xFFFF:
        return data
    table = np.empty(len(ends) + 1, ">u2")
    table[0], table[1], table[2:] = scan + length, ends[0] - scan, ends[1:] - ends[:-1]
    head = TABLE_HEAD.pack(0xFF00 | COM, length - 2, TABLE_MAGIC, layout.sof + length, *layout[1:])
    return b"".join((data[:COMMENT_AT], head, table, memoryview(data)[COMMENT_AT:]))


def _read_layout(data: bytes) -> tuple[JpegLayout, int]:
    """(layout, bytes of the comment that lists the pieces, 0 = none); raises as ``parse_jpeg``."""
    if len(data) > COMMENT_AT + TABLE_HEAD.size:
        _, length, magic, *fields = TABLE_HEAD.unpack_from(data, COMMENT_AT)
        if magic == TABLE_MAGIC:
            return JpegLayout(*fields), length + 2
    return parse_jpeg(data)[0], 0


def _read_pieces(data: bytes, comment: int, count: int) -> np.ndarray:
    """Where the scan begins, then the lengths of ``count`` pieces with their end markers, bytes.

    Integers (count + 1,): piece n begins at the sum of the first n + 1. Raises ValueError where the
    JPEG has other pieces.
    """
    if comment:
        table = np.frombuffer(data, ">u2", count + 1, COMMENT_AT + TABLE_HEAD.size)
    else:
        scan = parse_jpeg(data)[1]
        table = np.diff(_find_piece_ends(data, scan), prepend=(0, scan))
    if len(table) != count + 1 or np.add.reduce(table, dtype=np.int64) != len(data):
        raise ValueError(f"its pieces are not the {count} that its size asks for")
    return table


def cut_window(
    data: bytes, window: tuple[int, int, int, int]
) -> tuple[np.ndarray, int, int] | None:
    """A JPEG of the pieces that cover ``window``, which lies inside the image and is not empty.

    Args:
        data: a baseline JPEG, bytes or a view of some.

    Returns:
        (JPEG uint8 (n,), x, y): ``window`` begins at (x, y) of the smaller image. None where the
        JPEG has no grid of restart intervals, or cutting would spare too little to pay.

    Raises:
        ValueError: not a baseline JPEG, or its pieces are not those that its size asks for.
    """
    layout, comment = _read_layout(data)
    sof, height, width, high, mcu_width, interval = layout
    columns = -(-width // mcu_width)
    if interval == 0 or columns % interval:
        return None
    wide = mcu_width * interval
    across, rows = columns // interval, -(-height // high)
    x0, y0, x1, y1 = window
    # Chroma of half the resolution is interpolated with its neighbour, one pixel outside at least.
    margin_x, margin_y = mcu_width // 16, high // 16
    top, bottom = max(y0 - margin_y, 0) // high, min((y1 + margin_y - 1) // high + 1, rows)
    left = max(min(x0 - margin_x, width - MIN_WIDTH), 0) // wide
    right = min((x1 + margin_x - 1) // wide + 1, across)
    spared = rows * across - (bottom - top) * (right - left)
    if spared * wide * high < MIN_SPARED_PIXELS:
        return None
    x, y = left * wide, top * high
    # To the last MCU of each row, and a few pixels of it.
    cut_width = min(max(x1 + margin_x, right * wide - mcu_width + MIN_WIDTH), width) - x
    size = struct.pack(">HH", min(y1 + margin_y, height) - y, cut_width)
    table = _read_pieces(data, comment, rows * across)
    scan = table.item(0)
    head = data[:COMMENT_AT], data[COMMENT_AT + comment : sof], size, data[sof + 4 : scan]
    bounds = np.add.accumulate(table, dtype=np.int64)
    starts = bounds[top * across + left : bottom * across : across].tolist()
    stops = bounds[top * across + right : bottom * across + 1 : across].tolist()
    lengths = table[1:].reshape(rows, across)[top:bottom, left:right].ravel()
    pieces = (data[a:b] for a, b in zip(starts, stops))
    return _join_pieces(head, pieces, lengths), x0 - x, y0 - y


def _join_pieces(head: Sequence[bytes], pieces: Iterable[bytes], lengths: np.ndarray) -> np.ndarray:
    """One JPEG, uint8 (n,), in which the markers that end pieces of ``lengths`` (m,) take turns."""
    jpeg = np.frombuffer(bytearray().join((*head, *pieces)), np.uint8)
    turns = RESTARTS if len(lengths) <= len(RESTARTS) else np.resize(RESTARTS, len(lengths))
    # The second byte of the marker that ends each piece, counted from the last of the header.
    ends = np.add.accumulate(lengths, dtype=np.int64)
    jpeg[sum(map(len, head)) - 1 :][ends] = turns[: len(lengths)]
    jpeg[-1] = EOI
    return jpeg


def decode_window(data: bytes | memoryview, window: tuple[int, int, int, int]) -> np.ndarray:
    """``decode_jpeg(data)[y0:y1, x0:x1]``, reading only the pieces of the JPEG that it needs.

    uint8 RGB (y1 - y0, x1 - x0, 3), a view of what was decoded; raises as ``cut_window``.
    """
    x0, y0, x1, y1 = window
    jpeg, x, y = cut_window(data, window) or (data, x0, y0)
    return decode_jpeg(jpeg)[y : y + y1 - y0, x : x + x1 - x0]

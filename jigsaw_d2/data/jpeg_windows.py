"""JPEG samples of which a window decodes without the rest.

A restart marker after every k MCUs (minimum coded units) makes each interval, a *piece*, decodable
on its own. Where k divides the MCUs of a row, a JPEG is a grid of pieces: a header with the
window's size, the window's pieces with their markers renumbered, and an end marker are a valid JPEG
of just that window. Chroma upsampling looks one chroma sample beyond a pixel, so pieces are chosen
with that margin and the decoded window equals the full decode bit for bit.

A comment segment of ours lists the layout and the length of every piece; any other reader skips it.
Windows are XYXY ints in pixels of the sample, half-open.
"""

import struct

import cv2
import numpy as np
import simplejpeg

BASELINE_SOF, RESTART, EOI, SOS, DRI, COM = 0xC0, 0xD0, 0xD9, 0xDA, 0xDD, 0xFE
# A JFIF file begins with SOI and an APP0 segment of fixed length; the comment comes right behind.
COMMENT_AT = 20
TABLE_MAGIC = b"jigsaw-d2 pieces\0"
# Marker and length of the comment, magic; offset of the frame header's height field; height and
# width of the image and of an MCU, pixels; MCUs between restart markers. Then, uint16, where the
# scan begins and the length of every piece.
TABLE_HEAD = struct.Struct(">HH17sHHHBBH")
# MCUs between restart markers of grey samples, whose MCUs are 8 pixels wide; best first. Colour has
# one after every MCU: the finest grid costs no decoding time and about 2 % of the bytes.
GREY_INTERVALS = (2, 3, 5)
# Pixels of a cut's rows at least: chroma of less than 3 samples a row is not interpolated.
MIN_WIDTH = 5
# Pixels that a window must spare for cutting it out to pay: what decodes in the time of a cut.
MIN_SPARED_PIXELS = 3000


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
    return (list_pieces(data) if interval else data), interval


def choose_interval(width: int, grey: bool) -> int:
    """MCUs between restart markers for a sample of ``width`` pixels; divides its MCUs per row."""
    columns = -(-width // 8)
    return next((k for k in GREY_INTERVALS if grey and columns % k == 0), 1)


def list_pieces(data: bytes) -> bytes:
    """A baseline JFIF file with restart markers, with the comment that lists its pieces.

    As it is where a comment cannot hold them (more than 8 Mpx): then only the whole decodes.
    """
    position, marker = 2, 0
    while marker != SOS:
        marker, length = struct.unpack_from(">xBH", data, position)
        if marker == BASELINE_SOF:
            sof = position + 5
            height, width, components = struct.unpack_from(">HHB", data, sof)
            # A scan of one component is not interleaved: its MCU is one block, whatever factors.
            factors = data[sof + 6 : sof + 6 + 3 * components : 3] if components > 1 else b"\x11"
            mcu = 8 * max(f & 15 for f in factors), 8 * max(f >> 4 for f in factors)
        elif marker == DRI:
            (interval,) = struct.unpack_from(">H", data, position + 4)
        position += 2 + length
    scan = np.frombuffer(data, np.uint8, offset=position)
    # In entropy-coded bytes FF is followed by 00 except where a marker stands, which ends a piece.
    found = (scan[:-1] == 0xFF).nonzero()[0]
    ends = found[scan[found + 1] != 0] + 2
    length = TABLE_HEAD.size + 2 * (len(ends) + 1)
    if position + length > 0xFFFF:
        return data
    table = np.array([position + length, *np.diff(ends, prepend=0)], ">u2")
    layout = (sof + length, height, width, *mcu, interval)
    head = TABLE_HEAD.pack(0xFF00 | COM, length - 2, TABLE_MAGIC, *layout)
    return b"".join((data[:COMMENT_AT], head, table, data[COMMENT_AT:]))


def cut_window(
    data: bytes | memoryview, window: tuple[int, int, int, int]
) -> tuple[np.ndarray, int, int] | None:
    """A JPEG of the pieces that cover ``window``, which lies inside the image and is not empty.

    Returns:
        (JPEG uint8 (n,), x, y): ``window`` begins at (x, y) of the smaller image. None where the
        JPEG lists no grid of pieces, or cutting would spare too little to pay.

    Raises:
        ValueError: the pieces are not those that the comment lists.
    """
    if data[COMMENT_AT + 4 : COMMENT_AT + 4 + len(TABLE_MAGIC)] != TABLE_MAGIC:
        return None
    _, comment, _, *layout = TABLE_HEAD.unpack_from(data, COMMENT_AT)
    sof, height, width, high, mcu_width, interval = layout
    columns = -(-width // mcu_width)
    if columns % interval:
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
    table = np.frombuffer(data, ">u2", 1 + rows * across, COMMENT_AT + TABLE_HEAD.size)
    # Piece n lies between the bounds n and n + 1.
    bounds = np.add.accumulate(table, dtype=np.int64)
    if bounds[-1] != len(data):
        raise ValueError(f"its pieces are not the {rows * across} that it lists")
    behind, scan = COMMENT_AT + comment + 2, table.item(0)
    head = b"".join((data[:COMMENT_AT], data[behind:sof], size, data[sof + 4 : scan]))
    starts = bounds[top * across + left : bottom * across : across].tolist()
    stops = bounds[top * across + right : bottom * across + 1 : across].tolist()
    pieces = (data[a:b] for a, b in zip(starts, stops))
    jpeg = np.frombuffer(bytearray().join((head, *pieces)), np.uint8)
    # The markers that end pieces take turns, the second byte of each; the last ends the image.
    lengths = table[1:].reshape(rows, across)[top:bottom, left:right].ravel()
    ends = np.add.accumulate(lengths, dtype=np.int64) + (len(head) - 1)
    jpeg[ends] = RESTART + (np.arange(len(ends)) & 7)
    jpeg[-1] = EOI
    return jpeg, x0 - x, y0 - y


def decode_window(data: bytes | memoryview, window: tuple[int, int, int, int]) -> np.ndarray:
    """``decode_jpeg(data)[y0:y1, x0:x1]``, reading only the pieces of the JPEG that it needs.

    uint8 RGB (y1 - y0, x1 - x0, 3), a view of what was decoded; raises as both.
    """
    x0, y0, x1, y1 = window
    jpeg, x, y = cut_window(data, window) or (data, x0, y0)
    return decode_jpeg(jpeg)[y : y + y1 - y0, x : x + x1 - x0]

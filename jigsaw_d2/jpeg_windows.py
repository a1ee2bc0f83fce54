"""JPEG samples of which a window decodes without the rest.

A restart marker after every k MCUs (minimum coded units) makes each interval decodable on its own.
Where k divides the MCUs of a row, the image is a grid of independent pieces: a header with the
window's size, the window's pieces with their markers renumbered, and an end marker are a valid JPEG
of just that window. Chroma upsampling looks one chroma sample beyond a pixel, so pieces are chosen
with that margin and the decoded window equals the full decode bit for bit.

The length of every piece stands in a comment segment, so that none has to be searched for. All of
it is an ordinary baseline JPEG to any other reader.
"""

from typing import NamedTuple

import cv2
import numpy as np

SOI, EOI, SOS, DRI, COM, RST0 = 0xD8, 0xD9, 0xDA, 0xDD, 0xFE, 0xD0
BASELINE_SOF = (0xC0, 0xC1)
# Begins the comment that lists the pieces: big-endian uint16 lengths, their markers included.
TABLE_MAGIC = b"jigsaw-d2 pieces "
# Restart intervals tried, in MCUs, best first: 4 costs about 1.6 % of the bytes; the window then
# grows by half an interval (32 pixels) per side on average.
INTERVALS = (4, 3, 5, 6, 2)
# Pixels that a window must spare for cutting it out to pay: what decodes in the time of a cut.
MIN_SPARED_PIXELS = 4000
_RGB_FLAG = getattr(cv2, "IMREAD_COLOR_RGB", None)  # OpenCV 4.11 and later


class JpegLayout(NamedTuple):
    """Where the parts of one baseline JPEG lie; offsets in bytes, sizes in pixels."""

    sof: int  # offset of the height field in the frame header
    scan: int  # offset of the first entropy-coded byte
    height: int
    width: int
    mcu_height: int
    mcu_width: int
    interval: int  # MCUs between restart markers, 0 = none
    comment: int  # offset of the comment segment that lists the pieces, 0 = none


def parse_jpeg(data: bytes) -> JpegLayout:
    """Walk the segments up to the first scan.

    Raises:
        ValueError: not a JPEG, or not one with a single baseline scan.
    """
    if data[:2] != b"\xff\xd8":
        raise ValueError("not a JPEG: it does not begin with FF D8")
    position, sof, interval, comment = 2, 0, 0, 0
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
        elif marker == COM and data.startswith(TABLE_MAGIC, position + 4):
            comment = position
        elif marker == SOS:
            if not sof or data[position + 4] != components:
                break
            scan = position + 2 + length
            return JpegLayout(sof, scan, height, width, mcu_height, mcu_width, interval, comment)
        position += 2 + length
    raise ValueError("not a JPEG with a single baseline scan")


def cut_window(data: bytes, window: tuple[int, int, int, int]) -> tuple[bytes, int, int] | None:
    """A JPEG of the pieces that cover ``window``.

    Args:
        data: a baseline JPEG.
        window: XYXY pixels, half-open, inside the image, not empty.

    Returns:
        (JPEG, x, y): ``window`` begins at (x, y) of the smaller image. None where the JPEG has no
        grid of restart intervals, or cutting would spare too little to pay.

    Raises:
        ValueError: not a baseline JPEG, or its pieces are not those that its size asks for.
    """
    layout = parse_jpeg(data)
    columns = -(-layout.width // layout.mcu_width)
    if layout.interval == 0 or columns % layout.interval:
        return None
    piece, high = layout.mcu_width * layout.interval, layout.mcu_height
    across, rows = columns // layout.interval, -(-layout.height // high)
    x0, y0, x1, y1 = window
    margin_x, margin_y = layout.mcu_width // 8, high // 8
    left, top = max(x0 - margin_x, 0) // piece, max(y0 - margin_y, 0) // high
    right = min(-(-(x1 + margin_x) // piece), across)
    bottom = min(-(-(y1 + margin_y) // high), rows)
    spared = rows * across - (right - left) * (bottom - top)
    if spared * piece * high < MIN_SPARED_PIXELS:
        return None
    ends = _piece_ends(data, layout, rows * across).reshape(rows, across)
    body = _join_pieces(data, layout.scan, ends, left, top, right, bottom)
    height = min(bottom * high, layout.height) - top * high
    width = min(right * piece, layout.width) - left * piece
    size = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    header_end = layout.comment or layout.scan
    head = (data[: layout.sof], size, data[layout.sof + 4 : header_end])
    if layout.comment:
        after = (
            layout.comment
            + 2
            + int.from_bytes(data[layout.comment + 2 : layout.comment + 4], "big")
        )
        head += (data[after : layout.scan],)
    return b"".join((*head, body)), x0 - left * piece, y0 - top * high


def _piece_ends(data: bytes, layout: JpegLayout, count: int) -> np.ndarray:
    """Offsets just behind the marker that ends each of ``count`` pieces, int64 (count,)."""
    if layout.comment:
        table = layout.comment + 4 + len(TABLE_MAGIC)
        ends = np.cumsum(np.frombuffer(data, ">u2", count, table), dtype=np.int64)
        ends += layout.scan
    else:
        ends = find_piece_ends(data, layout.scan)
    if len(ends) != count or ends[-1] != len(data):
        raise ValueError(f"its pieces are not the {count} that its size asks for")
    return ends


def find_piece_ends(data: bytes, scan: int) -> np.ndarray:
    """Offsets just behind every marker from ``scan`` on, int64 (n,).

    In entropy-coded bytes FF is followed by 00 except where a marker stands.
    """
    array = np.frombuffer(data, np.uint8)
    found = np.flatnonzero(array[scan:-1] == 0xFF) + scan
    return found[array[found + 1] != 0] + 2


def _join_pieces(
    data: bytes, scan: int, ends: np.ndarray, left: int, top: int, right: int, bottom: int
) -> bytes:
    """The pieces [top:bottom, left:right] row by row, their markers renumbered, the last an EOI."""
    across, mine = ends.shape[1], ends[top:bottom, left:right]
    first = top * across + left - 1  # the piece before the first one
    starts = ends.ravel()[max(first, 0) : (bottom - 1) * across + left : across]
    if first < 0:
        starts = np.concatenate([[scan], ends[: bottom - 1, -1]])
    rows = [data[a:b] for a, b in zip(starts.tolist(), mine[:, -1].tolist())]
    body = bytearray().join(rows)
    lengths = mine[:, -1] - starts
    shift = np.cumsum(lengths) - lengths - starts - 1
    markers = (mine + shift[:, None]).ravel()
    view = np.frombuffer(body, np.uint8)
    view[markers] = RST0 + (np.arange(len(markers)) & 7)
    view[markers[-1]] = EOI
    return body


def decode_rgb(data: np.ndarray) -> np.ndarray | None:
    """uint8 RGB (h, w, 3) of an encoded image in ``data`` uint8 (n,); None where it is none."""
    if _RGB_FLAG is not None:
        return cv2.imdecode(data, _RGB_FLAG)
    image = cv2.imdecode(data, cv2.IMREAD_COLOR)
    return None if image is None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)


def decode_window(data: bytes, window: tuple[int, int, int, int]) -> np.ndarray | None:
    """``decode_rgb(data)[y0:y1, x0:x1]``, reading only the pieces of the JPEG that it needs.

    Returns:
        uint8 RGB (y1 - y0, x1 - x0, 3); None where OpenCV cannot decode the data.

    Raises:
        ValueError: as ``cut_window``.
    """
    x0, y0, x1, y1 = window
    jpeg, x, y = cut_window(data, window) or (data, x0, y0)
    image = decode_rgb(np.frombuffer(jpeg, np.uint8))
    return None if image is None else image[y : y + y1 - y0, x : x + x1 - x0]


def choose_interval(width: int, mcu_width: int) -> tuple[int, int]:
    """(k, columns): restart interval in MCUs and the MCUs per row that it divides.

    At most one MCU of padding columns is added; 2 divides one of two neighbours, so there is
    always a choice.
    """
    columns = -(-width // mcu_width)
    for wanted in (columns, columns + 1):
        for interval in INTERVALS:
            if wanted % interval == 0 and wanted > interval:
                return interval, wanted
    return columns, columns


def encode_jpeg(image: np.ndarray, quality: int, windows: bool = False) -> tuple[bytes, int]:
    """Encode uint8 BGR (h, w, 3) or grey (h, w); chroma 4:2:0.

    Args:
        windows: write a grid of restart intervals, with repeated border columns where the grid
            needs them (at most one MCU).

    Returns:
        (JPEG, restart interval in MCUs or 0).
    """
    options = [cv2.IMWRITE_JPEG_QUALITY, quality]
    interval = 0
    if windows:
        mcu_width = 8 if image.ndim == 2 else 16
        interval, columns = choose_interval(image.shape[1], mcu_width)
        if columns > -(-image.shape[1] // mcu_width):
            missing = columns * mcu_width - image.shape[1]
            image = cv2.copyMakeBorder(image, 0, 0, 0, missing, cv2.BORDER_REPLICATE)
        options += [cv2.IMWRITE_JPEG_RST_INTERVAL, interval]
    done, encoded = cv2.imencode(".jpg", image, options)
    if not done:
        raise ValueError(f"OpenCV cannot encode an image of shape {image.shape} as JPEG")
    data = encoded.tobytes()
    return (_list_pieces(data) if interval else data), interval


def _list_pieces(data: bytes) -> bytes:
    """The JPEG with a comment that lists its pieces, as far as a comment holds them."""
    scan = parse_jpeg(data).scan
    ends = find_piece_ends(data, scan)
    lengths = ends - np.concatenate([[scan], ends[:-1]])
    content = TABLE_MAGIC + lengths.astype(">u2").tobytes()
    if len(content) > 0xFFFD or lengths.max() > 0xFFFF:
        return data
    sos = data.rindex(bytes((0xFF, SOS)), 0, scan)
    segment = bytes((0xFF, COM)) + (len(content) + 2).to_bytes(2, "big") + content
    return data[:sos] + segment + data[sos:]


def encode_png(image: np.ndarray) -> bytes:
    """Encode uint8 BGR (h, w, 3) or grey (h, w) without loss."""
    done, encoded = cv2.imencode(".png", image)
    if not done:
        raise ValueError(f"OpenCV cannot encode an image of shape {image.shape} as PNG")
    return encoded.tobytes()

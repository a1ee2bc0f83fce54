"""JPEG samples of which a window decodes without the rest.

A restart marker after every k MCUs (minimum coded units) makes each interval decodable on its own.
Where k divides the MCUs of a row, the image is a grid of independent pieces: a header with the
window's size, the window's pieces with their markers renumbered, and an end marker are a valid JPEG
of just that window. Chroma upsampling looks one chroma sample beyond a pixel, so pieces are chosen
with that margin and the decoded window equals the full decode bit for bit.
"""

from typing import NamedTuple

import cv2
import numpy as np

RST0, EOI, SOS, DRI = 0xD0, 0xD9, 0xDA, 0xDD
BASELINE_SOF = (0xC0, 0xC1)
# Restart intervals tried, in MCUs, best first: 4 costs about 1.6 % of the bytes; the window then
# grows by half an interval (32 pixels) per side on average.
INTERVALS = (4, 3, 5, 6, 2)
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


def parse_jpeg(data: bytes | memoryview) -> JpegLayout:
    """Walk the segments up to the first scan.

    Raises:
        ValueError: not a JPEG, or not one with a single baseline scan.
    """
    if bytes(data[:2]) != b"\xff\xd8":
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
            factors = [data[sof + 6 + 3 * c] for c in range(components)]
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
            return JpegLayout(sof, scan, height, width, mcu_height, mcu_width, interval)
        position += 2 + length
    raise ValueError("not a JPEG with a single baseline scan")


def cut_window(
    data: np.ndarray, window: tuple[int, int, int, int]
) -> tuple[bytes, int, int] | None:
    """A JPEG of the pieces that cover ``window``.

    Args:
        data: uint8 (n,), a baseline JPEG.
        window: XYXY pixels, half-open, inside the image, not empty.

    Returns:
        (JPEG, x, y): ``window`` begins at (x, y) of the smaller image. None where the JPEG has no
        grid of restart intervals, or the pieces would be the whole.

    Raises:
        ValueError: not a baseline JPEG, or fewer restart markers than its size needs.
    """
    head = data[:1024].tobytes()
    layout = parse_jpeg(head)
    columns = -(-layout.width // layout.mcu_width)
    if layout.interval == 0 or columns % layout.interval:
        return None
    piece_width, pieces_per_row = layout.mcu_width * layout.interval, columns // layout.interval
    rows = -(-layout.height // layout.mcu_height)
    x0, y0, x1, y1 = window
    margin_x, margin_y = layout.mcu_width // 8, layout.mcu_height // 8
    left, top = max(x0 - margin_x, 0) // piece_width, max(y0 - margin_y, 0) // layout.mcu_height
    right = min(-(-(x1 + margin_x) // piece_width), pieces_per_row)
    bottom = min(-(-(y1 + margin_y) // layout.mcu_height), rows)
    if (left, top, right, bottom) == (0, 0, pieces_per_row, rows):
        return None
    ends = _interval_ends(data, layout.scan, rows * pieces_per_row).reshape(rows, pieces_per_row)
    body = _join_pieces(data, layout.scan, ends, left, top, right, bottom)
    new_height = min(bottom * layout.mcu_height, layout.height) - top * layout.mcu_height
    new_width = min(right * piece_width, layout.width) - left * piece_width
    size = new_height.to_bytes(2, "big") + new_width.to_bytes(2, "big")
    jpeg = b"".join((head[: layout.sof], size, head[layout.sof + 4 : layout.scan], body))
    return jpeg, x0 - left * piece_width, y0 - top * layout.mcu_height


def _interval_ends(data: np.ndarray, scan: int, count: int) -> np.ndarray:
    """Offsets just behind the marker that ends each of ``count`` intervals, int64 (count,).

    In entropy-coded bytes FF is followed by 00 except where a marker stands.
    """
    found = np.flatnonzero(data[scan:-1] == 0xFF) + scan
    found = found[data[found + 1] != 0]
    if len(found) != count:
        raise ValueError(f"{len(found)} markers where the size of the image needs {count}")
    return found + 2


def _join_pieces(
    data: np.ndarray, scan: int, ends: np.ndarray, left: int, top: int, right: int, bottom: int
) -> bytes:
    """The pieces [top:bottom, left:right] row by row, their markers renumbered, the last an EOI."""
    starts = np.concatenate([[scan], ends.ravel()[:-1]]).reshape(ends.shape)
    row_starts, row_ends = starts[top:bottom, left], ends[top:bottom, right - 1]
    body = np.concatenate([data[a:b] for a, b in zip(row_starts.tolist(), row_ends.tolist())])
    row_offsets = np.concatenate([[0], np.cumsum(row_ends - row_starts)[:-1]])
    markers = (
        ends[top:bottom, left:right] - row_starts[:, None] + row_offsets[:, None]
    ).ravel() - 1
    body[markers] = RST0 + (np.arange(len(markers)) & 7)
    body[markers[-1]] = EOI
    return body.tobytes()


def decode_rgb(data: np.ndarray) -> np.ndarray | None:
    """uint8 RGB (h, w, 3) of an encoded image in ``data`` uint8 (n,); None where it is none."""
    if _RGB_FLAG is not None:
        return cv2.imdecode(data, _RGB_FLAG)
    image = cv2.imdecode(data, cv2.IMREAD_COLOR)
    return None if image is None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)


def decode_window(data: np.ndarray, window: tuple[int, int, int, int]) -> np.ndarray | None:
    """``decode_rgb(data)[y0:y1, x0:x1]``, reading only the pieces of the JPEG that it needs.

    Raises:
        ValueError: as ``cut_window``.
    """
    x0, y0, x1, y1 = window
    cut = cut_window(data, window)
    if cut is None:
        image, x, y = decode_rgb(data), x0, y0
    else:
        image, x, y = decode_rgb(np.frombuffer(cut[0], np.uint8)), cut[1], cut[2]
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
    """Encode uint8 RGB (h, w, 3) or grey (h, w); chroma 4:2:0.

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
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    done, encoded = cv2.imencode(".jpg", image, options)
    if not done:
        raise ValueError(f"OpenCV cannot encode an image of shape {image.shape} as JPEG")
    return encoded.tobytes(), interval


def encode_png(image: np.ndarray) -> bytes:
    """Encode uint8 RGB (h, w, 3) or grey (h, w) without loss."""
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    done, encoded = cv2.imencode(".png", image)
    if not done:
        raise ValueError(f"OpenCV cannot encode an image of shape {image.shape} as PNG")
    return encoded.tobytes()

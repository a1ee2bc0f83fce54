"""JPEG samples of which a window decodes without the rest.

Where the restart interval divides the MCUs of a row, a JPEG is a grid of pieces that decode alone
(``jpeg_layout``): a header with the window's size, the window's pieces with their markers
renumbered, and an end marker are a valid JPEG of just that window. Chroma upsampling looks one
chroma sample beyond a pixel, so pieces are chosen with that margin and the decoded window equals
the full decode bit for bit.

Colour samples get a marker after every MCU: the finest grid costs no decoding time and about 2 % of
the bytes, and a window then decodes a fifth fewer pixels than on a grid of 4.
"""

import struct
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np

from jigsaw_d2.store.jpeg_decoding import decode_jpeg
from jigsaw_d2.store.jpeg_layout import (
    COMMENT_AT,
    JpegLayout,
    list_pieces,
    parse_jpeg,
    read_layout,
    read_pieces,
)

RST0, EOI = 0xD0, 0xD9
# MCUs between restart markers of grey samples, whose MCUs are 8 pixels wide; best first.
GREY_INTERVALS = (2, 3, 5)
# Pixels of a cut's rows at least: chroma of less than 3 samples a row is not interpolated.
MIN_WIDTH = 5
# Pixels that a window must spare for cutting it out to pay: what decodes in the time of a cut.
MIN_SPARED_PIXELS = 3000
# The markers that end pieces, in turn; as many as the windows of the usual templates need.
_RESTARTS = np.tile(np.arange(RST0, RST0 + 8, dtype=np.uint8), 64)


class PieceGrid(NamedTuple):
    """A window on the grid of pieces, half-open."""

    rows: int  # of the whole grid
    across: int  # columns of it
    top: int
    bottom: int
    left: int
    right: int
    margin_y: int  # pixels beside the window that its pixels depend on
    margin_x: int

    @property
    def spared(self) -> int:
        """Pieces that need not be decoded."""
        return self.rows * self.across - (self.bottom - self.top) * (self.right - self.left)


def spares_pixels(size: tuple[int, int], window: tuple[int, int, int, int]) -> bool:
    """Whether cutting ``window`` out of an image of ``size`` (height, width) can pay at all."""
    x0, y0, x1, y1 = window
    return size[0] * size[1] - (x1 - x0) * (y1 - y0) >= MIN_SPARED_PIXELS


def _find_grid(layout: JpegLayout, window: tuple[int, int, int, int]) -> PieceGrid | None:
    """The pieces under ``window``; None where they do not lie in a grid."""
    _, height, width, high, mcu_width, interval = layout
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
    return PieceGrid(rows, across, top, bottom, left, right, margin_y, margin_x)


def cut_window(
    data: bytes, window: tuple[int, int, int, int]
) -> tuple[np.ndarray, int, int] | None:
    """A JPEG of the pieces that cover ``window``.

    Args:
        data: a baseline JPEG, bytes or a view of some.
        window: XYXY pixels, half-open, inside the image, not empty.

    Returns:
        (JPEG uint8 (n,), x, y): ``window`` begins at (x, y) of the smaller image. None where the
        JPEG has no grid of restart intervals, or cutting would spare too little to pay.

    Raises:
        ValueError: not a baseline JPEG, or its pieces are not those that its size asks for.
    """
    layout, comment = read_layout(data)
    grid = _find_grid(layout, window)
    wide, high = layout.mcu_width * layout.interval, layout.mcu_height
    if grid is None or grid.spared * wide * high < MIN_SPARED_PIXELS:
        return None
    x, y = grid.left * wide, grid.top * high
    height = min(window[3] + grid.margin_y, layout.height) - y
    # To the last MCU of each row, and a few pixels of it.
    width = max(window[2] + grid.margin_x, grid.right * wide - layout.mcu_width + MIN_WIDTH) - x
    size = struct.pack(">HH", height, min(width, layout.width - x))
    jpeg = _join_pieces(data, layout.sof, comment, grid, size)
    return jpeg, window[0] - x, window[1] - y


def _join_pieces(data: bytes, sof: int, comment: int, grid: PieceGrid, size: bytes) -> np.ndarray:
    """The header with another size, and the pieces of ``grid`` with their markers in turn."""
    rows, across, top, bottom, left, right, *_ = grid
    table = read_pieces(data, comment, rows * across)
    bounds = np.add.accumulate(table, dtype=np.int64)
    scan = bounds.item(0)
    if bounds.item(-1) != len(data):
        raise ValueError(f"its pieces are not the {rows * across} that its size asks for")
    starts = bounds[top * across + left : bottom * across : across].tolist()
    stops = bounds[top * across + right : bottom * across + 1 : across].tolist()
    head = data[:COMMENT_AT], data[COMMENT_AT + comment : sof], size, data[sof + 4 : scan]
    body = [data[a:b] for a, b in zip(starts, stops)]
    jpeg = np.frombuffer(bytearray().join((*head, *body)), np.uint8)
    lengths = table[1:].reshape(rows, across)[top:bottom, left:right].ravel()
    # The second byte of the marker that ends each piece, counted from the last of the header.
    ends = np.add.accumulate(lengths, dtype=np.int64)
    turns = _RESTARTS if len(ends) <= len(_RESTARTS) else np.resize(_RESTARTS, len(ends))
    jpeg[scan - comment - 1 :][ends] = turns[: len(ends)]
    jpeg[-1] = EOI
    return jpeg


def decode_window(
    data: bytes | memoryview,
    window: tuple[int, int, int, int],
    memory: np.ndarray | None = None,
) -> np.ndarray:
    """``decode_jpeg(data)[y0:y1, x0:x1]``, reading only the pieces of the JPEG that it needs.

    Args:
        memory: as for ``decode_jpeg``, for the whole image.

    Returns:
        uint8 RGB (y1 - y0, x1 - x0, 3), a view of what was decoded.

    Raises:
        ValueError: as ``cut_window`` and ``decode_jpeg``.
    """
    x0, y0, x1, y1 = window
    jpeg, x, y = cut_window(data, window) or (data, x0, y0)
    return decode_jpeg(jpeg, "RGB", memory)[y : y + y1 - y0, x : x + x1 - x0]


def choose_interval(width: int, grey: bool) -> int:
    """MCUs between restart markers for a sample of ``width`` pixels; divides its MCUs per row."""
    if not grey:
        return 1
    columns = -(-width // 8)
    return next((k for k in GREY_INTERVALS if columns % k == 0), 1)


def encode_jpeg(image: np.ndarray, quality: int, windows: bool = False) -> tuple[bytes, int]:
    """Encode uint8 BGR (h, w, 3) or grey (h, w); chroma 4:2:0.

    Args:
        windows: write restart markers and the comment that lists the pieces.

    Returns:
        (JPEG, restart interval in MCUs or 0).
    """
    grey = image.ndim == 2
    interval = choose_interval(image.shape[1], grey) if windows else 0
    data = _encode(image, quality, interval)
    if interval:
        layout, scan = _usual_layout(grey, interval)
        data = list_pieces(data, layout._replace(height=image.shape[0], width=image.shape[1]), scan)
    return data, interval


def _encode(image: np.ndarray, quality: int, interval: int) -> bytes:
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_RST_INTERVAL, interval]
    done, encoded = cv2.imencode(".jpg", image, options)
    if not done:
        raise ValueError(f"OpenCV cannot encode an image of shape {image.shape} as JPEG")
    return encoded.tobytes()


@lru_cache
def _usual_layout(grey: bool, interval: int) -> tuple[JpegLayout, int]:
    """As ``parse_jpeg``, of what OpenCV writes: its headers differ in the size alone."""
    image = np.zeros((8, 8) if grey else (8, 8, 3), np.uint8)
    return parse_jpeg(_encode(image, 95, interval))


def encode_png(image: np.ndarray) -> bytes:
    """Encode uint8 BGR (h, w, 3) or grey (h, w) without loss."""
    done, encoded = cv2.imencode(".png", image)
    if not done:
        raise ValueError(f"OpenCV cannot encode an image of shape {image.shape} as PNG")
    return encoded.tobytes()


def decode_png(data: bytes | memoryview) -> np.ndarray:
    """uint8 RGB (h, w, 3).

    Raises:
        ValueError: OpenCV cannot decode it.
    """
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError("not an image that OpenCV decodes")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)

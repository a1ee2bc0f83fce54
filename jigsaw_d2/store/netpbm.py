"""Uncompressed samples: binary PPM (colour) and PGM (grey), which any image reader opens.

About ten times the bytes of a JPEG, but nothing to decode: a window is a view of the mapped file.
"""

import re

import cv2
import numpy as np

# Magic, width, height and the greatest value, as ``encode_netpbm`` writes them.
_HEADER = re.compile(rb"P([56])\n(\d+) (\d+)\n255\n")
_HEADER_BYTES = 32  # at most


def encode_netpbm(image: np.ndarray) -> bytes:
    """uint8 BGR (h, w, 3) as PPM, or grey (h, w) as PGM."""
    grey = image.ndim == 2
    pixels = np.ascontiguousarray(image) if grey else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    height, width = image.shape[:2]
    return b"P%d\n%d %d\n255\n" % (5 if grey else 6, width, height) + pixels.tobytes()


def decode_netpbm(data: bytes | memoryview, window: tuple[int, int, int, int]) -> np.ndarray:
    """The ``window`` (XYXY pixels, half-open) of a PPM or PGM; of colour a read-only view.

    Returns:
        uint8 RGB (y1 - y0, x1 - x0, 3).

    Raises:
        ValueError: not as ``encode_netpbm`` writes them, or of another length.
    """
    header = _HEADER.match(bytes(data[:_HEADER_BYTES]))
    if header is None:
        raise ValueError("not a binary PPM or PGM of 8 bits")
    kind, width, height = map(int, header.groups())
    shape = (height, width, 3) if kind == 6 else (height, width)
    pixels = np.frombuffer(data, np.uint8, offset=header.end())
    if pixels.size != np.prod(shape):
        raise ValueError(f"not the pixels of {width} x {height}")
    x0, y0, x1, y1 = window
    shown = pixels.reshape(shape)[y0:y1, x0:x1]
    return shown if kind == 6 else cv2.cvtColor(shown, cv2.COLOR_GRAY2RGB)

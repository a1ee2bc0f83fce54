"""JPEG bytes -> pixels, by libjpeg-turbo, into memory that may be used again.

OpenCV and Pillow decode with the same library to the same pixels, but into fresh memory each time,
which the system hands out page by page: for small images that takes as long as decoding.
"""

import numpy as np
import simplejpeg


class PixelMemory:
    """Memory that images are decoded into in turn; the pixels of one last until the next."""

    def __init__(self) -> None:
        self._room = np.empty(0, np.uint8)

    def room(self, size: int) -> np.ndarray:
        """uint8 (n,) of at least ``size`` bytes; what was there before may be gone."""
        if len(self._room) < size:
            # From an odd address on: rows that begin at an aligned one are written past the cache,
            # at up to a third more time.
            self._room = np.empty(size + 1, np.uint8)[1:]
        return self._room


def decode_jpeg(
    data: bytes | memoryview | np.ndarray, colour: str = "RGB", memory: np.ndarray | None = None
) -> np.ndarray:
    """The pixels of a whole JPEG, not turned by its EXIF orientation.

    Args:
        data: of one JPEG; as an array uint8 (n,).
        colour: "RGB", "BGR" or "GRAY", whatever the JPEG itself has.
        memory: of ``PixelMemory``; None = fresh memory.

    Returns:
        uint8 (h, w, 3), of "GRAY" (h, w).

    Raises:
        ValueError: not a JPEG, a damaged or truncated one, or more pixels than ``memory`` takes.
    """
    # By position: fastdct and fastupsample off, as the other readers have them; no scaling; strict.
    pixels = simplejpeg.decode_jpeg(data, colour, False, False, 0, 0, 1, memory, True)
    return pixels[..., 0] if colour == "GRAY" else pixels

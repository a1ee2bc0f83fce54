"""Image files -> the pixels that Detectron2's reader gives, or a named reason why not.

Both functions raise DataError whose text is one of the reasons in ``report.REASONS``.
"""

import os

import cv2
import numpy as np
from PIL import ExifTags, Image

from jigsaw_d2.data.jpeg_windows import decode_jpeg
from jigsaw_d2.io import DataError

# By EXIF orientation, from 2 on: how Pillow turns an image upright.
UPRIGHT = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
UPRIGHT = {n: Image.Transpose[name] for n, name in enumerate(UPRIGHT.split(), 2)}
SWAPS_SIDES = (5, 6, 7, 8)
GREY_MODES = ("1", "L", "LA")
ALPHA_MODES = ("LA", "PA", "RGBA", "La", "RGBa")
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
# Last bytes of a whole file; where they are missing, only decoding tells whether pixels are too.
ENDINGS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


def _open(path: str) -> Image.Image:
    try:
        if os.path.getsize(path) == 0:
            raise DataError("image_empty")
        return Image.open(path)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError("image_missing") from None
    except Image.UnidentifiedImageError:
        raise DataError("image_not_an_image") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # Pillow's own OSErrors, about what is in the file, come without the system's number.
        refused = getattr(error, "errno", None) is not None
        raise DataError("image_unreadable" if refused else "image_truncated") from error


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # EXIF is free-form: Detectron2's reader ignores what it cannot parse, too
        return 1


def _notes(image: Image.Image, orientation: int) -> tuple[str, ...]:
    if image.mode in DEEP_MODES:
        raise DataError("image_16_bit")
    notes = {
        "image_grey": image.mode in GREY_MODES,
        "image_palette": image.mode in ("P", "PA"),
        "image_cmyk": image.mode == "CMYK",
        "image_alpha": image.mode in ALPHA_MODES or "transparency" in image.info,
        "image_rotated": orientation in UPRIGHT,
    }
    return tuple(note for note, true in notes.items() if true)


def probe_image(path: str) -> tuple[tuple[int, int], tuple[str, ...]]:
    """Size (height, width) as read, i.e. upright, and what is special (keys of ``REASONS``).

    From the header: it decodes only where the file's end looks cut off.
    """
    with _open(path) as image:
        orientation = _orientation(image)
        notes = _notes(image, orientation)
        width, height = image.size
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - 8))
            if not file.read().endswith(ENDINGS.get(image.format, b"")):
                _load(image)
    return (width, height) if orientation in SWAPS_SIDES else (height, width), notes


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except Exception as error:  # Pillow's decoders raise what they like on broken files
        raise DataError("image_truncated") from error


def read_pixels(path: str) -> np.ndarray:
    """uint8 BGR (h, w, 3), or (h, w) where the image is grey: upright, as Detectron2 reads it.

    BGR, because OpenCV encodes from it.
    """
    with _open(path) as image:
        orientation = _orientation(image)
        _notes(image, orientation)
        if image.format == "JPEG" and image.mode in ("RGB", "L") and orientation not in UPRIGHT:
            try:  # the same pixels without Pillow's copies; what is broken, Pillow judges
                with open(path, "rb") as file:
                    return decode_jpeg(file.read(), "GRAY" if image.mode == "L" else "BGR")
            except (OSError, ValueError):
                pass
        _load(image)
        if orientation in UPRIGHT:
            image = image.transpose(UPRIGHT[orientation])
        mode = "L" if image.mode in GREY_MODES else "RGB"
        pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels if mode == "L" else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)

"""Image files -> the pixels that Detectron2's reader gives, or a named reason why not.

Both functions raise DataError whose text is one of the reasons in ``report.REASONS``.
"""

import os

import cv2
import numpy as np
from PIL import ExifTags, Image

from jigsaw_d2.data.jpeg_windows import decode_jpeg
from jigsaw_d2.io import DataError

MEMORY = "/proc/meminfo"  # of Linux
# By EXIF orientation, from 2 on: how Pillow turns an image upright.
UPRIGHT = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
UPRIGHT = {n: Image.Transpose[name] for n, name in enumerate(UPRIGHT.split(), 2)}
SWAPS_SIDES = (5, 6, 7, 8)
GREY_MODES = ("1", "L", "LA")
ALPHA_MODES = ("LA", "PA", "RGBA", "La", "RGBa")
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
SAMPLES_PER_PIXEL = 277  # TIFF's tag
# 16-bit channels of which the largest value stays below this, of 256, after the reader's cut to the
# upper 8 bits hold 12 bits or so: a nearly black image.
DARKEST = 32
# A pixel's bytes where it is read: Pillow's own, its RGB copy, the BGR copy and the samples.
BYTES_PER_PIXEL = 12
# Pillow's limit is for servers; here the user brings the images, and memory is what limits. It
# holds for Detectron2's reader too, which opens images by Pillow in the same processes.
Image.MAX_IMAGE_PIXELS = None
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
        with open(path, "rb") as file:
            is_tiff = file.read(4) in TIFF_STARTS
        raise DataError("image_of_other_form" if is_tiff else "image_not_an_image") from None
    except (OSError, ValueError, SyntaxError) as error:
        # Pillow's own OSErrors, about what is in the file, come without the system's number.
        refused = getattr(error, "errno", None) is not None
        raise DataError("image_unreadable" if refused else "image_truncated") from error


def _orientation(image: Image.Image) -> int:
    try:
        # Pillow decodes the whole of a PNG to see what stands behind its pixels.
        is_plain = image.format == "PNG" and not _texts_behind_pixels(image.filename)
        exif = Image.Image.getexif(image) if is_plain else image.getexif()
        return int(exif.get(ExifTags.Base.Orientation, 1))
    except Exception:  # EXIF is free-form: Detectron2's reader ignores what it cannot parse, too
        return 1


def _texts_behind_pixels(path: str) -> bool:
    """Whether EXIF or text follows a PNG's last pixels, or those happen to look like it."""
    with open(path, "rb") as file:
        behind = file.read().rpartition(b"IDAT")[2]
    return any(kind in behind for kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"))


def _describe(image: Image.Image) -> tuple[int, tuple[str, ...]]:
    """EXIF orientation, and what is special."""
    if image.mode in DEEP_MODES:
        raise DataError("image_16_bit")
    _check_memory(image)
    is_deep = ";16" in str(image.tile)  # before a PNG's EXIF is asked for, which can decode it
    if is_deep:
        _load(image)
        if max(high for _, high in image.convert("RGB").getextrema()) < DARKEST:
            raise DataError("image_16_bit")
    orientation = _orientation(image)
    bands = image.tag_v2.get(SAMPLES_PER_PIXEL, 0) if image.format == "TIFF" else 0
    notes = {
        "image_16_bit_colour": is_deep,
        "image_bands_dropped": bands > len(image.getbands()),
        "image_grey": image.mode in GREY_MODES,
        "image_palette": image.mode in ("P", "PA"),
        "image_cmyk": image.mode == "CMYK",
        "image_alpha": image.mode in ALPHA_MODES or "transparency" in image.info,
        "image_rotated": orientation in UPRIGHT,
    }
    return orientation, tuple(note for note, true in notes.items() if true)


def _check_memory(image: Image.Image) -> None:
    """Refuse an image that would not fit; Linux kills a process that tries."""
    needed = image.width * image.height * BYTES_PER_PIXEL
    if needed > 1 << 30:  # any machine has room for less
        with open(MEMORY) as file:
            free = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
        if needed > free << 10:
            raise DataError("image_too_large")


def probe_image(path: str) -> tuple[tuple[int, int], tuple[str, ...]]:
    """Size (height, width) as read, i.e. upright, and what is special (keys of ``REASONS``).

    From the header: it decodes only where the file's end looks cut off.
    """
    with _open(path) as image:
        orientation, notes = _describe(image)
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
        orientation, _ = _describe(image)
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

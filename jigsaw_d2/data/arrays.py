"""Images of any number of channels: read as arrays, measured, shown.

Where INPUT.FORMAT is C and a number, or a letter for each channel other than RGB and BGR, images
are no pictures to Detectron2's reader but arrays (h, w, C), of uint8, uint16 or float32,
whose values are taken as they are.
"""

import importlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from jigsaw_d2.io import ConfigError, DataError

if TYPE_CHECKING:
    from detectron2.config import CfgNode

PICTURES = ("RGB", "BGR", "YUV-BT.601")  # that Detectron2's reader makes of any image
DTYPES = ("uint8", "uint16", "float32")
# Images at most whose pixels are measured: beyond, mean and standard deviation move in the third
# digit.
MEASURED = 256


def channels_of(image_format: str) -> int:
    """Channels of arrays: 4 of "C4" or "RGBN"; 0 of what Detectron2's reader makes, such as "RGB".

    (A bare number would not do: yacs makes an int of the text "4", and refuses it for a name.)

    Raises:
        ConfigError: a format that is none of these.
    """
    if image_format in PICTURES:
        return 0
    if re.fullmatch("C[1-9][0-9]*", image_format):
        return int(image_format[1:])
    if image_format.isalpha():
        return len(image_format)
    raise ConfigError(
        f"INPUT.FORMAT is {image_format!r}: use RGB, BGR, C and a number, or a letter for each"
    )


@dataclass(frozen=True)
class ArrayReader:
    """Path -> array (h, w, channels). ``function``, "module:name", replaces what reads the file."""

    channels: int
    function: str = ""

    def __call__(self, path: str) -> np.ndarray:
        """Uint8, uint16 or float32 (h, w, channels); red before blue where a file says which.

        Raises:
            DataError: its text is one of the reasons in ``report.REASONS``.
        """
        read = _find(self.function) if self.function else _read
        try:
            array = read(path)
        except DataError:
            raise
        except FileNotFoundError:
            raise DataError("image_missing") from None
        except (OSError, ValueError, EOFError, cv2.error) as error:
            raise DataError("image_truncated") from error
        array = np.asarray(array)
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
        array = array[..., None] if array.ndim == 2 else array
        if array.dtype == np.float64:
            array = array.astype(np.float32)
        if array.ndim != 3 or array.dtype.name not in DTYPES or not array.size:
            raise DataError("image_of_other_form")
        if array.shape[2] != self.channels:
            raise DataError("image_of_other_channels")
        return array

    def probe(self, path: str) -> tuple[tuple[int, int], tuple[str, ...]]:
        """Size (height, width), and nothing special, as ``image_reading.probe_image``."""
        height, width, _ = self(path).shape
        return (height, width), ()


def make_reader(cfg: "CfgNode") -> ArrayReader | None:
    """Of INPUT.FORMAT and INPUT.READER; None where Detectron2's own reader serves."""
    channels = channels_of(cfg.INPUT.FORMAT)
    if cfg.INPUT.READER and not channels:
        raise ConfigError(
            f"INPUT.READER {cfg.INPUT.READER!r} reads arrays, but INPUT.FORMAT is "
            f"{cfg.INPUT.FORMAT}: say how many channels they have, such as INPUT.FORMAT C3"
        )
    return ArrayReader(channels, cfg.INPUT.READER) if channels else None


def _find(name: str) -> Any:
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"reader {name!r} is no module:function: {error}") from error


def _read(path: str) -> np.ndarray:
    if not os.path.getsize(path):
        raise DataError("image_empty")
    if path.endswith(".npy"):
        return np.load(path, mmap_mode="r", allow_pickle=False)
    with open(path, "rb") as file:
        array = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED)
    if array is None:
        raise DataError("image_not_an_image")
    if array.ndim == 3 and array.shape[2] in (3, 4):  # OpenCV has blue first
        array = array[..., [2, 1, 0, 3][: array.shape[2]]]
    return array


def measure(paths: Sequence[str], reader: ArrayReader) -> dict[str, Any]:
    """Mean and standard deviation of each channel over ``MEASURED`` of the images, and their type.

    Returns:
        {"channels": C, "dtype": ..., "pixel_mean": C floats, "pixel_std": C floats}.

    Raises:
        DataError: none of them can be read; images of several types.
    """
    step = max(1, -(-len(paths) // MEASURED))
    count, total, squares, dtypes = 0, 0.0, 0.0, set()
    for path in paths[::step]:
        try:
            array = reader(path)
        except DataError:
            continue  # the cutting counts it
        pixels = array.reshape(-1, reader.channels).astype(np.float64)
        dtypes.add(array.dtype.name)
        count += len(pixels)
        total = total + pixels.sum(axis=0)
        squares = squares + (pixels**2).sum(axis=0)
    if len(dtypes) != 1:
        raise DataError(f"images of {' and '.join(sorted(dtypes)) or 'no'} type: one is needed")
    mean = total / count
    if not np.isfinite(mean).all():
        odd = np.flatnonzero(~np.isfinite(mean)).tolist()
        raise DataError(
            f"channels {odd} hold NaN or infinity: write the images with a number in their place, "
            "or read them by a --reader of yours that gives one"
        )
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    if not (std > 0).all():
        empty = np.flatnonzero(std == 0).tolist()
        raise DataError(f"channels {empty} have one value everywhere: leave them out")
    rounded = [[float(f"{value:.6g}") for value in values] for values in (mean, std)]
    sizes = {"channels": reader.channels, "dtype": dtypes.pop()}
    return sizes | {"pixel_mean": rounded[0], "pixel_std": rounded[1]}


def show(image: np.ndarray) -> np.ndarray:
    """The first three channels of (h, w, C) as uint8 RGB (h, w, 3), stretched if not uint8.

    The last of fewer channels is repeated: grey of one.
    """
    image = image[..., [min(c, image.shape[2] - 1) for c in range(3)]]
    if image.dtype == np.uint8:
        return image
    low, high = np.percentile(image, (1, 99))
    return np.clip((image - low) * (255 / max(high - low, 1e-9)), 0, 255).astype(np.uint8)

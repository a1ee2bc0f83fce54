"""The decoder gives the pixels of the other readers, and fresh ones each time."""

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers_store import draw_image
from PIL import Image

from jigsaw_d2.data.jpeg_windows import PixelMemory, decode_jpeg


def encode(height: int, width: int, *options: int) -> bytes:
    image = draw_image(height, width, 1, np.random.default_rng(height))
    return cv2.imencode(".jpg", image, list(options))[1].tobytes()


@pytest.mark.parametrize("size", [(1, 1), (17, 16), (64, 64), (37, 160), (200, 333)])
@pytest.mark.parametrize("progressive", [0, 1])
def test_pixels_are_those_of_opencv_and_pillow(size: tuple[int, int], progressive: int) -> None:
    data = encode(*size, cv2.IMWRITE_JPEG_PROGRESSIVE, progressive)
    bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    memory = PixelMemory().room(bgr.size)
    for room in (None, memory):
        assert np.array_equal(decode_jpeg(data, "BGR", room), bgr)
        assert np.array_equal(decode_jpeg(data, "RGB", room), Image.open(io.BytesIO(data)))
        grey = Image.open(io.BytesIO(data)).convert("YCbCr").split()[0]
        assert np.abs(decode_jpeg(data, "GRAY", room).astype(int) - np.asarray(grey)).max() <= 1


def test_grey_jpegs_come_as_grey_and_as_colour() -> None:
    data = cv2.imencode(".jpg", draw_image(50, 70, 1, np.random.default_rng(0))[..., 0])[1]
    grey = decode_jpeg(data.ravel(), "GRAY")
    assert np.array_equal(grey, cv2.imdecode(data, cv2.IMREAD_UNCHANGED))
    assert np.array_equal(decode_jpeg(memoryview(data.tobytes())), np.dstack([grey] * 3))


@pytest.mark.parametrize("cut", [300, 1500, -3])
def test_damaged_data_are_refused(cut: int) -> None:
    data = encode(90, 120)
    with pytest.raises(ValueError):
        decode_jpeg(data[:cut])
    with pytest.raises(ValueError):
        decode_jpeg(b"")


def test_memory_is_used_again_and_grows() -> None:
    memory = PixelMemory()
    small = memory.room(1000)
    assert len(small) >= 1000 and small.ctypes.data % 2 == 1
    assert memory.room(500) is small
    assert len(memory.room(5000)) >= 5000
    data = encode(40, 40)
    first, second = (decode_jpeg(data, "RGB", memory.room(4800)) for _ in range(2))
    assert np.shares_memory(first, second)
    assert not np.shares_memory(decode_jpeg(data), decode_jpeg(data))
    with pytest.raises(ValueError):
        decode_jpeg(data, "RGB", np.empty(4799, np.uint8))


def test_exif_orientation_is_not_followed(tmp_path: Path) -> None:
    image = Image.fromarray(draw_image(40, 60, 1, np.random.default_rng(0)))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert decode_jpeg((tmp_path / "a.jpg").read_bytes()).shape == (40, 60, 3)

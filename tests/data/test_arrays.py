"""Arrays of any number of channels: what is read, measured, refused and shown."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from jigsaw_d2.data.arrays import ArrayReader, channels_of, measure, show
from jigsaw_d2.data.assembly import Augmentation, paint, place_sample
from jigsaw_d2.data.extraction import ExtractionOptions
from jigsaw_d2.io import ConfigError, DataError


@pytest.mark.parametrize(
    ("name", "count"), [("RGB", 0), ("BGR", 0), ("C4", 4), ("RGBN", 4), ("L", 1), ("C12", 12)]
)
def test_formats(name: str, count: int) -> None:
    assert channels_of(name) == count


@pytest.mark.parametrize("name", ["C0", "", "R-G", "4"])
def test_no_format(name: str) -> None:
    with pytest.raises(ConfigError, match="INPUT.FORMAT is"):
        channels_of(name)


@pytest.mark.parametrize(
    ("suffix", "shape", "dtype"),
    [
        (".png", (5, 7, 4), "uint8"),  # with alpha
        (".png", (5, 7), "uint16"),  # 16 bits of grey, as they are
        (".tiff", (5, 7, 4), "uint16"),
        (".tiff", (5, 7), "float32"),
        (".png", (5, 7, 3), "uint8"),
        (".npy", (5, 7, 6), "uint16"),
    ],
)
def test_files_are_read_as_they_are(suffix: str, shape: tuple, dtype: str, tmp_path: Path) -> None:
    """Red first, whatever OpenCV does."""
    array = (np.arange(np.prod(shape)) * 7 % 251).reshape(shape).astype(dtype)
    path = str(tmp_path / f"image{suffix}")
    if suffix == ".npy":
        np.save(path, array)
    else:
        order = {4: [2, 1, 0, 3], 3: [2, 1, 0]}.get(shape[2] if len(shape) > 2 else 1)
        assert cv2.imwrite(path, array if order is None else array[..., order])
    read = ArrayReader(shape[2] if len(shape) > 2 else 1)
    assert np.array_equal(read(path), array.reshape(5, 7, -1)) and read(path).dtype == dtype
    assert read.probe(path) == ((5, 7), ())
    with pytest.raises(DataError, match="image_of_other_channels"):
        ArrayReader(5)(path)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    np.save(tmp_path / "long.npy", np.zeros((2, 2, 1), np.int64))
    for suffix in ("npy", "tiff", "png"):
        (tmp_path / f"empty.{suffix}").touch()
    (tmp_path / "cut.npy").write_bytes((tmp_path / "long.npy").read_bytes()[:9])
    for name, reason in (
        ("empty.npy", "image_empty"),
        ("empty.tiff", "image_empty"),
        ("empty.png", "image_empty"),
        ("cut.npy", "image_truncated"),
        ("gone.npy", "image_missing"),
        ("text.png", "image_not_an_image"),
        ("long.npy", "image_of_other_form"),
    ):
        with pytest.raises(DataError, match=reason):
            ArrayReader(1)(str(tmp_path / name))
    with pytest.raises(ConfigError, match="'nowhere:read' is no module:function"):
        ArrayReader(1, "nowhere:read")("x.npy")


def test_numbers_of_another_machine_are_those_of_this(tmp_path: Path) -> None:
    np.save(tmp_path / "big.npy", np.full((2, 2), 7, ">f4"))
    array = ArrayReader(1)(str(tmp_path / "big.npy"))
    assert array.dtype == np.float32 and array.dtype.isnative and (array == 7).all()


def test_measured_by_hand(tmp_path: Path) -> None:
    """Channel 0: 0 and 2, mean 1, std 1; channel 1: 1, 1, 1, 5, mean 2, std sqrt(3)."""
    paths = [str(tmp_path / f"{n}.npy") for n in range(2)]
    np.save(paths[0], np.array([[[0, 1], [2, 1]]], np.uint8))
    np.save(paths[1], np.array([[[0, 1], [2, 5]]], np.uint8))
    found = measure(paths, ArrayReader(2))
    assert found["pixel_mean"] == [1, 2] and found["pixel_std"] == [1, pytest.approx(3**0.5)]
    assert (found["channels"], found["dtype"]) == (2, "uint8")
    np.save(paths[1], np.array([[[0, 1], [2, 5]]], np.uint16))
    with pytest.raises(DataError, match="uint16 and uint8 type"):
        measure(paths, ArrayReader(2))
    with pytest.raises(DataError, match=r"channels \[0, 1\] have one value"):
        measure(paths[:1] and [str(_constant(tmp_path))], ArrayReader(2))
    np.save(paths[0], np.array([[[0, np.nan], [2, 1]]], np.float32))
    with pytest.raises(DataError, match=r"channels \[1\] hold NaN"):
        measure(paths[:1], ArrayReader(2))


def _constant(folder: Path) -> Path:
    np.save(folder / "same.npy", np.ones((3, 3, 2), np.uint8))
    return folder / "same.npy"


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_every_channel_is_painted_as_a_picture_is(channels: int) -> None:
    """Channel by channel the same as a grey picture of it, resized, cropped and flipped."""
    rng = np.random.default_rng(0)
    source = rng.integers(0, 256, (40, 30, channels), dtype=np.uint8)
    placement = place_sample((40, 30), (24, 20), "pad_crop", Augmentation(1.3, True, 0.4, 0.7))
    x0, y0, x1, y1 = placement.window
    out = np.zeros((24, 20, channels), np.float32)
    paint(source[y0:y1, x0:x1], placement, out)
    for channel in range(channels):
        picture = np.repeat(source[y0:y1, x0:x1, channel, None], 3, axis=2)
        expected = np.zeros((24, 20, 3), np.uint8)
        paint(picture, placement, expected)
        assert (
            np.abs(out[..., channel] - expected[..., 0]).max() <= 1
        )  # which rounds, in fixed point


def test_shown_as_a_picture() -> None:
    deep = np.linspace(1000, 60000, 48).reshape(4, 4, 3).astype(np.uint16)
    shown = show(deep)
    assert shown.dtype == np.uint8 and shown.min() == 0 and shown.max() == 255
    grey = np.arange(4, dtype=np.uint8).reshape(2, 2, 1)
    assert np.array_equal(show(grey)[..., 2], grey[..., 0])  # grey of one channel
    five = np.arange(20, dtype=np.uint8).reshape(2, 2, 5)
    assert np.array_equal(show(five), five[..., :3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 4, "quality": 90}, "arrays are stored as npy"),
        ({"channels": 4, "encoding": "png"}, "arrays are stored as npy"),
        ({"reader": "mine:read"}, "say of how many channels"),
        ({"channels": -1}, "channels is -1"),
    ],
)
def test_options_that_contradict(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExtractionOptions(**options)

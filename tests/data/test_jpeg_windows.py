"""The decoder gives the pixels of other readers; a window those of the full decode, bit for bit."""

import io
from collections.abc import Iterator

import cv2
import numpy as np
import pytest
from helpers_store import draw_image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jigsaw_d2.data import jpeg_windows
from jigsaw_d2.data.jpeg_windows import (
    TABLE_MAGIC,
    cut_window,
    decode_jpeg,
    decode_window,
    encode_jpeg,
    list_pieces,
)

SUBSAMPLINGS = {
    "4:2:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    "4:2:2": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422,
    "4:4:4": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    "4:4:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440,
    "4:1:1": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411,
}


@pytest.fixture(autouse=True, scope="module")
def always_cut() -> Iterator[None]:
    """Cut even where it does not pay, so that small images are tests, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jpeg_windows, "MIN_SPARED_PIXELS", 0)
        yield


def full_decode(data: bytes) -> np.ndarray:
    """By OpenCV, which knows nothing of windows."""
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), 1), cv2.COLOR_BGR2RGB)


@st.composite
def sizes_and_windows(draw: st.DrawFn) -> tuple[int, int, tuple[int, int, int, int], int]:
    height, width = draw(st.integers(1, 330)), draw(st.integers(1, 330))
    x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    x1, y1 = draw(st.integers(x0 + 1, width)), draw(st.integers(y0 + 1, height))
    return height, width, (x0, y0, x1, y1), draw(st.integers(0, 2**31))


@settings(max_examples=200)
@given(sizes_and_windows(), st.integers(5, 100), st.booleans())
def test_window_equals_full_decode(case: tuple, quality: int, grey: bool) -> None:
    height, width, window, seed = case
    image = draw_image(height, width, seed % 7, np.random.default_rng(seed))
    data, interval = encode_jpeg(image[..., 0].copy() if grey else image, quality, windows=True)
    assert interval > 0
    x0, y0, x1, y1 = window
    assert np.array_equal(decode_window(data, window), full_decode(data)[y0:y1, x0:x1])


@pytest.mark.parametrize("width", range(33, 50))
@pytest.mark.parametrize("grey", [False, True])
def test_narrow_windows_at_both_edges(width: int, grey: bool) -> None:
    """Every window of up to 6 columns: what is left of a piece there may be a pixel wide."""
    image = np.random.default_rng(width).integers(0, 256, (20, width, 3), np.uint8)
    data, _ = encode_jpeg(image[..., 0].copy() if grey else image, 90, windows=True)
    full = full_decode(data)
    for x0 in range(width):
        for x1 in range(x0 + 1, min(x0 + 7, width + 1)):
            assert np.array_equal(decode_window(data, (x0, 2, x1, 19)), full[2:19, x0:x1]), x0


@settings(max_examples=150)
@given(
    sizes_and_windows(),
    st.sampled_from(list(SUBSAMPLINGS)),
    st.integers(1, 6),
    st.integers(20, 100),
)
def test_window_of_any_subsampling(case, subsampling, interval, quality) -> None:
    """Other chroma, and intervals that may not divide the row."""
    height, width, window, seed = case
    image = draw_image(height, width, seed % 5, np.random.default_rng(seed))
    options = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, SUBSAMPLINGS[subsampling]]
    options += [cv2.IMWRITE_JPEG_RST_INTERVAL, interval, cv2.IMWRITE_JPEG_QUALITY, quality]
    data = list_pieces(cv2.imencode(".jpg", image, options)[1].tobytes())
    assert TABLE_MAGIC in data
    x0, y0, x1, y1 = window
    assert np.array_equal(decode_window(data, window), full_decode(data)[y0:y1, x0:x1])


def test_cut_is_smaller_and_an_ordinary_jpeg() -> None:
    image = draw_image(600, 640, 1, np.random.default_rng(0))
    data, interval = encode_jpeg(image, 95, windows=True)
    assert interval == 1
    cut, x, y = cut_window(data, (300, 280, 420, 400))
    assert np.array_equal(Image.open(io.BytesIO(data)), full_decode(data))
    # Pieces are 16 x 16 pixels: with a margin of one pixel they begin at column 288 and row 272.
    # The image ends one pixel behind the window, at row 401 and column 421.
    assert (x, y) == (12, 8)
    assert Image.open(io.BytesIO(cut)).size == (133, 129)
    assert len(cut) < len(data) * 0.07


def test_what_lists_no_pieces_decodes_whole() -> None:
    """A comment holds the pieces of 8 Mpx at most: a larger sample is written without one."""
    large = np.full((4000, 2608, 3), 128, np.uint8)  # 250 x 163 MCUs
    data, _ = encode_jpeg(large, 90, windows=True)
    for data in (data, plain_jpeg(100, 100, cv2.IMWRITE_JPEG_PROGRESSIVE, 1)):
        assert cut_window(data, (60, 2, 90, 9)) is None
        assert np.array_equal(decode_window(data, (60, 2, 90, 9)), decode_jpeg(data)[2:9, 60:90])


def test_window_that_spares_little_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jpeg_windows, "MIN_SPARED_PIXELS", 3000)
    data, _ = encode_jpeg(draw_image(256, 256, 0, np.random.default_rng(0)), 90, windows=True)
    assert cut_window(data, (0, 0, 256, 250)) is None
    assert cut_window(data, (0, 0, 100, 100)) is not None


def test_lost_bytes_are_noticed() -> None:
    data, _ = encode_jpeg(draw_image(300, 300, 0, np.random.default_rng(0)), 90, windows=True)
    with pytest.raises(ValueError, match="pieces"):
        cut_window(data[:-200], (0, 0, 50, 50))


def plain_jpeg(height: int, width: int, *options: int) -> bytes:
    image = draw_image(height, width, 1, np.random.default_rng(height))
    return cv2.imencode(".jpg", image, list(options))[1].tobytes()


@pytest.mark.parametrize("size", [(1, 1), (17, 16), (200, 333)])
@pytest.mark.parametrize("progressive", [0, 1])
def test_pixels_are_those_of_opencv_and_pillow(size: tuple[int, int], progressive: int) -> None:
    data = plain_jpeg(*size, cv2.IMWRITE_JPEG_PROGRESSIVE, progressive)
    bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert np.array_equal(decode_jpeg(data, "BGR"), bgr)
    assert np.array_equal(decode_jpeg(data), Image.open(io.BytesIO(data)))
    data = cv2.imencode(".jpg", bgr[..., 0])[1]
    grey = decode_jpeg(data.ravel(), "GRAY")
    assert np.array_equal(grey, cv2.imdecode(data, cv2.IMREAD_UNCHANGED))
    assert np.array_equal(decode_jpeg(memoryview(data.tobytes())), np.dstack([grey] * 3))


@pytest.mark.parametrize("kept", [0, 300, 1500, -3])
def test_damaged_data_are_refused(kept: int) -> None:
    with pytest.raises(ValueError):
        decode_jpeg(plain_jpeg(90, 120)[:kept])

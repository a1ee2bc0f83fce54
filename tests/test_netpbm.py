"""Uncompressed samples: what was encoded comes back, in any reader."""

import io

import numpy as np
import pytest
from PIL import Image

from jigsaw_d2.data.store import decode_netpbm, encode_netpbm


def picture(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("size", [(1, 1), (31, 17), (200, 5)])
def test_colour_and_grey_come_back_here_and_in_pillow(size: tuple[int, int]) -> None:
    whole = (0, 0, size[1], size[0])
    for image, rgb in (
        (picture(*size, 3), picture(*size, 3)[..., ::-1]),
        (picture(*size), np.dstack([picture(*size)] * 3)),
    ):
        data = encode_netpbm(image)
        assert np.array_equal(decode_netpbm(data, whole), rgb)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), rgb)


def test_window_of_a_view_is_not_copied() -> None:
    image = picture(40, 50, 3)
    data = memoryview(b"before" + encode_netpbm(image) + b"after")[6:-5]
    shown = decode_netpbm(data, (10, 5, 30, 25))
    assert np.array_equal(shown, image[5:25, 10:30, ::-1])
    assert np.shares_memory(shown, np.frombuffer(data, np.uint8)) and not shown.flags.writeable


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], "not the pixels of 7 x 4"),
        (lambda data: data + b"\0", "not the pixels of 7 x 4"),
        (lambda data: b"P3" + data[2:], "not a binary PPM"),
        (lambda data: b"", "not a binary PPM"),
    ],
)
def test_other_data_are_refused(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_netpbm(change(encode_netpbm(picture(4, 7, 3))), (0, 0, 1, 1))

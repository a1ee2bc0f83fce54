"""The pixels are those of Detectron2's reader; what cannot be read has a name."""

from pathlib import Path

import numpy as np
import pytest
from detectron2.data.detection_utils import read_image
from helpers_store import draw_image
from PIL import Image

from jigsaw_d2.data.image_reading import probe_image, read_pixels
from jigsaw_d2.io import DataError

PICTURE = Image.fromarray(draw_image(40, 64, 0, np.random.default_rng(0)))


def save(path: Path, image: Image.Image = PICTURE, **options: object) -> str:
    image.save(path, **options)
    return str(path)


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """What ``read_pixels`` gives, BGR or grey, as Detectron2's reader gives it."""
    return np.dstack([pixels] * 3) if pixels.ndim == 2 else pixels[..., ::-1]


@pytest.mark.parametrize("orientation", range(0, 10))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_orientation_as_detectron2_applies_it(tmp_path, orientation, suffix) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation  # 1 to 8 are defined, 0 and 9 are not
    path = save(tmp_path / f"a.{suffix}", exif=exif)
    pixels, (size, notes) = read_pixels(path), probe_image(path)
    assert np.array_equal(as_rgb(pixels), read_image(path, "RGB"))
    assert pixels.shape[:2] == size == ((64, 40) if 5 <= orientation <= 8 else (40, 64))
    assert notes == (("image_rotated",) if 2 <= orientation <= 8 else ())


@pytest.mark.parametrize(
    "mode, suffix, notes",
    [
        ("RGB", "jpg", ()),
        ("RGB", "bmp", ()),
        ("RGB", "webp", ()),
        ("L", "jpg", ("image_grey",)),
        ("L", "png", ("image_grey",)),
        ("1", "png", ("image_grey",)),
        ("LA", "png", ("image_grey", "image_alpha")),
        ("P", "png", ("image_palette",)),
        ("P", "gif", ("image_palette",)),
        ("P", "png", ("image_palette", "image_alpha")),
        ("CMYK", "jpg", ("image_cmyk",)),
        ("RGBA", "png", ("image_alpha",)),
    ],
)
def test_modes_as_detectron2_converts_them(tmp_path, mode, suffix, notes) -> None:
    transparent = {"transparency": 3} if "image_alpha" in notes and mode == "P" else {}
    path = save(tmp_path / f"a.{suffix}", PICTURE.convert(mode), **transparent)
    assert np.array_equal(as_rgb(read_pixels(path)), read_image(path, "RGB"))
    assert probe_image(path) == ((40, 64), notes)


def reason(path: str | Path) -> str:
    """The one reason that both probing and reading give."""
    with pytest.raises(DataError) as read:
        read_pixels(str(path))
    with pytest.raises(DataError, match=f"^{read.value}$"):
        probe_image(str(path))
    return str(read.value)


def test_missing_empty_and_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "image_empty").touch()
    (tmp_path / "image_not_an_image").write_text("not an image, whatever its name says")
    (tmp_path / "image_unreadable").mkdir()
    for name in ("missing", "empty", "not_an_image", "unreadable"):
        assert reason(tmp_path / f"image_{name}") == f"image_{name}"


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_truncated_files(tmp_path: Path, suffix: str, kept: float) -> None:
    path = Path(save(tmp_path / f"a.{suffix}"))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    assert reason(path) == "image_truncated"


def test_bytes_behind_the_end_are_harmless(tmp_path: Path) -> None:
    path = Path(save(tmp_path / "a.jpg"))
    before = read_pixels(str(path))
    path.write_bytes(path.read_bytes() + b"\0\0trailing")
    assert probe_image(str(path))[0] == (40, 64)
    assert np.array_equal(read_pixels(str(path)), before)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_images_are_refused(tmp_path: Path, mode: str) -> None:
    """Detectron2's reader would saturate all values from 255 on to white."""
    values = np.arange(64 * 64, dtype=np.float32).reshape(64, 64) * 16
    types = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
    path = save(tmp_path / "a.tiff", Image.fromarray(values.astype(types[mode])))
    assert (read_image(path, "RGB") == 255).mean() > 0.9
    assert reason(path) == "image_16_bit"

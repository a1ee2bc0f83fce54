"""The pixels are those of Detectron2's reader; what cannot be read has a name."""

import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data.detection_utils import read_image
from helpers_store import draw_image
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from jigsaw_d2.data import image_reading
from jigsaw_d2.data.image_reading import probe_image, read_pixels
from jigsaw_d2.io import DataError

PICTURE = Image.fromarray(draw_image(40, 64, 0, np.random.default_rng(0)))


def save(path: Path, image: Image.Image = PICTURE, **options: object) -> str:
    image.save(path, **options)
    return str(path)


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """What ``read_pixels`` gives, BGR or grey, as Detectron2's reader gives it."""
    return np.dstack([pixels] * 3) if pixels.ndim == 2 else pixels[..., ::-1]


def test_a_png_is_not_decoded_for_its_size_and_its_exif_is_found_behind_the_pixels(
    tmp_path, monkeypatch
) -> None:
    plain = save(tmp_path / "plain.png")
    rotated = save(
        tmp_path / "rotated.png",
        exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03" b"\0\0\0\x01\0\x06\0\0\0\0\0\0",
    )
    content = Path(rotated).read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    behind = tmp_path / "behind.png"
    behind.write_bytes(content[:start] + content[end:-12] + content[start:end] + content[-12:])
    loaded = []
    load = PngImageFile.load
    monkeypatch.setattr(PngImageFile, "load", lambda i: (loaded.append(i.filename), load(i))[1])
    assert probe_image(plain) == ((40, 64), ())
    assert probe_image(rotated) == probe_image(str(behind)) == ((64, 40), ("image_rotated",))
    assert set(loaded) == {str(behind)}


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


def _multi_band_tiff(path: Path, bands: int) -> None:
    """An uncompressed 8-bit TIFF of 4 x 3 pixels, written by hand: Pillow writes no such file."""
    entries = [(256, 3, 1, 4), (257, 3, 1, 3), (259, 3, 1, 1), (262, 3, 1, 2), (278, 3, 1, 3)]
    size, shorts = 12 * bands, struct.pack(f"<{bands}H", *[8] * bands)
    start = 8 + 2 + 12 * (len(entries) + 5) + 4
    entries += [(258, 3, bands, start), (273, 4, 1, start + len(shorts)), (277, 3, 1, bands)]
    extra = 0 if bands == 5 else start + len(shorts) + size  # two values fit in the entry itself
    entries += [(279, 4, 1, size), (338, 3, bands - 3, extra)]
    table = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    head = struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + table + struct.pack("<I", 0)
    path.write_bytes(head + shorts + bytes(size) + bytes(2 * (bands - 3)))


def test_tiffs_of_many_bands_are_named_rightly(tmp_path: Path) -> None:
    _multi_band_tiff(tmp_path / "5.tif", 5)
    _multi_band_tiff(tmp_path / "8.tif", 8)
    assert probe_image(str(tmp_path / "5.tif")) == ((3, 4), ("image_bands_dropped",))
    with pytest.raises(DataError, match="image_of_other_form"):
        probe_image(str(tmp_path / "8.tif"))


def test_16_bit_colour_is_read_as_detectron2_reads_it_unless_that_is_black(tmp_path: Path) -> None:
    deep = np.random.default_rng(0).integers(0, 1 << 16, (20, 30, 3), dtype=np.uint16)
    path = str(tmp_path / "deep.png")
    cv2.imwrite(path, deep)
    assert probe_image(path) == ((20, 30), ("image_16_bit_colour",))
    assert np.array_equal(read_pixels(path), read_image(path, "BGR"))
    cv2.imwrite(path, deep >> 4)  # 12 bits in 16: the upper 8 bits are all below 16
    with pytest.raises(DataError, match="image_16_bit"):
        probe_image(path)


def test_no_image_is_called_damaged_for_its_size(tmp_path: Path, monkeypatch) -> None:
    path = str(tmp_path / "large.png")
    Image.new("1", (14000, 13000)).save(path, compress_level=1)  # above twice Pillow's limit
    assert probe_image(path) == ((13000, 14000), ("image_grey",))
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:   1000000 kB\n")  # 12 bytes a pixel: 2.2 GiB
    monkeypatch.setattr(image_reading, "MEMORY", str(meminfo))
    with pytest.raises(DataError, match="image_too_large"):
        probe_image(path)

"""The pixels are those of Detectron2's reader; what cannot be read has a name."""

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data.detection_utils import read_image
from helpers_store import draw_image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jigsaw_d2.extraction import image_reading
from jigsaw_d2.data.image_reading import (
    ImageInfo,
    ImageReadError,
    probe_image,
    read_pixels,
)
from jigsaw_d2.data.image_reading import probe_common_jpeg
from jigsaw_d2.data.jpeg_windows import PixelMemory

PICTURE = Image.fromarray(draw_image(40, 64, 0, np.random.default_rng(0)))


def save(path: Path, image: Image.Image = PICTURE, **options: object) -> str:
    image.save(path, **options)
    return str(path)


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """What ``read_pixels`` gives, BGR or grey, as Detectron2's reader gives it."""
    return np.dstack([pixels] * 3) if pixels.ndim == 2 else pixels[..., ::-1]


@pytest.mark.parametrize("orientation", range(0, 10))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_orientation_as_detectron2_applies_it(
    tmp_path: Path, orientation: int, suffix: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation  # 1 to 8 are defined, 0 and 9 are not
    path = save(tmp_path / f"a.{suffix}", exif=exif)
    pixels, info = read_pixels(path), probe_image(path)
    assert np.array_equal(as_rgb(pixels), read_image(path, "RGB"))
    assert pixels.shape[:2] == info.size == ((64, 40) if 5 <= orientation <= 8 else (40, 64))
    assert info.notes == (("image_rotated",) if 2 <= orientation <= 8 else ())


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
        ("CMYK", "jpg", ("image_cmyk",)),
        ("RGBA", "png", ("image_alpha",)),
    ],
)
def test_modes_as_detectron2_converts_them(
    tmp_path: Path, mode: str, suffix: str, notes: tuple
) -> None:
    path = save(tmp_path / f"a.{suffix}", PICTURE.convert(mode))
    assert np.array_equal(as_rgb(read_pixels(path)), read_image(path, "RGB"))
    info = probe_image(path)
    assert info == ((40, 64), notes, mode if suffix == "jpg" and mode in ("RGB", "L") else "")
    assert np.array_equal(read_pixels(path, info.plain), read_pixels(path))


def test_transparent_palette_is_read_like_any_other(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", PICTURE.convert("P"), transparency=3)
    assert np.array_equal(as_rgb(read_pixels(path)), read_image(path, "RGB"))
    assert probe_image(path).notes == ("image_palette", "image_alpha")


def reason(path: str | Path) -> str:
    """The one reason that both probing and reading give."""
    found = set()
    for function in (probe_image, read_pixels):
        with pytest.raises(ImageReadError) as caught:
            function(str(path))
        found.add(caught.value.reason)
    assert len(found) == 1
    return found.pop()


def test_missing_empty_and_foreign_files(tmp_path: Path) -> None:
    assert reason(tmp_path / "none.jpg") == "image_missing"
    (tmp_path / "empty.jpg").touch()
    assert reason(tmp_path / "empty.jpg") == "image_empty"
    (tmp_path / "text.jpg").write_text("not an image, whatever its name says")
    assert reason(tmp_path / "text.jpg") == "image_not_an_image"
    (tmp_path / "folder.jpg").mkdir()
    assert reason(tmp_path / "folder.jpg") == "image_unreadable"


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_truncated_files(tmp_path: Path, suffix: str, kept: float) -> None:
    path = Path(save(tmp_path / f"a.{suffix}"))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    assert reason(path) == "image_truncated"


def test_plain_jpeg_that_changed_since_it_was_probed(tmp_path: Path) -> None:
    path = Path(save(tmp_path / "a.jpg"))
    assert probe_image(str(path)).plain == "RGB"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ImageReadError, match="image_truncated"):
        read_pixels(str(path), "RGB")
    path.unlink()
    with pytest.raises(ImageReadError, match="image_missing"):
        read_pixels(str(path), "RGB")


def test_bytes_behind_the_end_are_harmless(tmp_path: Path) -> None:
    path = Path(save(tmp_path / "a.jpg"))
    before = read_pixels(str(path))
    path.write_bytes(path.read_bytes() + b"\0\0trailing")
    assert probe_image(str(path)).size == (40, 64)
    assert np.array_equal(read_pixels(str(path)), before)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_images_are_refused(tmp_path: Path, mode: str) -> None:
    """Detectron2's reader would saturate all values from 255 on to white."""
    values = np.arange(64 * 64, dtype=np.float32).reshape(64, 64) * 16
    types = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
    path = save(tmp_path / "a.tiff", Image.fromarray(values.astype(types[mode])))
    assert (read_image(path, "RGB") == 255).mean() > 0.9
    assert reason(path) == "image_16_bit"


def test_memory_holds_file_and_pixels_and_is_used_again(tmp_path: Path) -> None:
    memory, small = PixelMemory(), PICTURE.crop((0, 0, 30, 20))
    for image, mode in ((PICTURE, "RGB"), (small, "RGB"), (PICTURE.convert("L"), "L")):
        path = save(tmp_path / "a.jpg", image)
        pixels = read_pixels(path, mode, (image.height, image.width), memory)
        assert np.shares_memory(pixels, memory.room(1))
        assert np.array_equal(pixels, read_pixels(path))


def test_plain_jpeg_that_grew_since_it_was_probed(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg")
    assert np.array_equal(read_pixels(path, "RGB", (20, 30), PixelMemory()), read_pixels(path))


def probed(path: Path) -> ImageInfo | str:
    """What ``probe_image`` gives, or the reason why not."""
    try:
        return probe_image(str(path))
    except ImageReadError as error:
        return error.reason


def jpeg(**options: object) -> bytes:
    buffer = io.BytesIO()
    PICTURE.convert(options.pop("mode", "RGB")).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def with_segment(marker: int, content: bytes) -> bytes:
    """The usual JPEG with one more segment behind the first."""
    segment = bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content
    return jpeg()[:20] + segment + jpeg()[20:]


# An image resource: signature, number, empty name, length, content.
RESOURCE = b"8BIM\x04\x04\0\0\0\0\0\x02ab"


HEADS = {
    "usual": jpeg(),
    "grey": jpeg(mode="L"),
    "cmyk": jpeg(mode="CMYK"),
    "progressive": jpeg(progressive=True),
    "by OpenCV": cv2.imencode(".jpg", np.zeros((9, 7, 3), np.uint8))[1].tobytes(),
    "comment": jpeg(comment=b"some words"),
    "profile": jpeg(icc_profile=b"colours"),
    "short profile": with_segment(0xE2, b"ICC_PROFILE\0"),
    "more pictures": with_segment(0xE2, b"MPF\0" + bytes(10)),
    "xmp": jpeg(xmp=b'<x tiff:Orientation="6"/>'),
    "short JFIF": jpeg()[:2] + b"\xff\xe0\0\x07JFIF\0" + jpeg()[20:],
    "short APP1": jpeg()[:20] + b"\xff\xe1\0\1" + jpeg()[20:],
    "other APP1": with_segment(0xE1, b'XMP\0:/<x tiff:Orientation="6"/>'),
    "photoshop": with_segment(0xED, b"Photoshop 3.0\0" + 2 * RESOURCE),
    "resource cut off": with_segment(0xED, b"Photoshop 3.0\0" + RESOURCE + RESOURCE[:6]),
    "resource cut later": with_segment(0xED, b"Photoshop 3.0\0" + RESOURCE[:7]),
    "long comment": with_segment(0xFE, bytes(5000)),
    "longest comment": with_segment(0xFE, bytes(65533)),
    "without JFIF": jpeg()[:2] + jpeg()[20:],
    "fill byte": jpeg()[:20] + b"\xff" + jpeg()[20:],
    "long scan header": jpeg().replace(b"\xff\xda\0", b"\xff\xda\1"),
    "cut in the scan header": jpeg()[: jpeg().index(b"\xff\xda") + 5] + b"\xff\xd9",
    "behind the end": jpeg() + b"\0",
    "two bytes": b"\xff\xd9",
    "one byte": b"\xff",
    "start and end": b"\xff\xd8\xff\xd9",
}


# Those that need no Pillow.
KNOWN = (
    "usual, grey, progressive, by OpenCV, comment, long comment, without JFIF, profile, other APP1"
)
KNOWN = (*KNOWN.split(", "), "photoshop", "resource cut later")


def assert_pillow_agrees(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        found = probed(path)
        patch.setattr(image_reading, "probe_common_jpeg", lambda path: None)
        assert probed(path) == found


@pytest.mark.parametrize("name", HEADS)
def test_probe_without_pillow_gives_the_same(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(HEADS[name])
    assert (probe_common_jpeg(str(path)) is not None) == (name in KNOWN)
    assert_pillow_agrees(path)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(["usual", "grey", "profile", "photoshop", "other APP1"]), st.data())
def test_probe_without_pillow_of_damaged_heads(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    content = bytearray(HEADS[name])
    scan = content.index(b"\xff\xda")
    for _ in range(data.draw(st.integers(1, 3))):
        values = st.one_of(st.integers(0, 255), st.sampled_from([0, 1, 2, 3, 0xC0, 0xDB, 0xFF]))
        content[data.draw(st.integers(0, scan + 12))] = data.draw(values)
    path = tmp_path_factory.getbasetemp() / "damaged.jpg"
    path.write_bytes(content)
    assert_pillow_agrees(path)

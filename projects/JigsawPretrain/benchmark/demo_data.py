"""A detection set drawn from a seed: COCO format, eight classes, textures, overlaps, crowds.

It exists so that the whole pipeline can be tried, and tested, where no dataset is at hand. An image
depends on (seed, split, its number) alone. Pairs of classes share a silhouette and differ in
texture and in the hue of one of their two colours. The ground and objects of no class have any.
"""

import colorsys
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import cv2
import numpy as np

from jigsaw_d2.io import DataError
from jigsaw_d2.tools.pipeline import DetectionSet
from jigsaw_d2.tools.stages import check_same

Array = np.ndarray
SPLITS = ("train", "val")
CROWD_SHARE = 0.06  # of the images
MIN_VISIBLE = 0.5  # of each object's pixels, whatever is drawn over it later
HUE_SPREAD = 20.0
MIN_SIDE = 12  # pixels; smaller objects have no texture to tell them by
SUPERSAMPLING = 2


@dataclass(frozen=True)
class ShapeClass:
    """One category: its name, the range of width / height it is drawn with, and how it looks.

    ``inside`` and ``tone`` take object coordinates u, v (float arrays of one shape; -1..1 over the
    object's width and height, v downwards): its silhouette (bool), and its texture, which blends
    the object's two colours (float, 0..1), both of that shape.
    """

    name: str
    aspect: tuple[float, float]
    hue: int | None  # of the first colour, degrees, give or take HUE_SPREAD; None = any colour
    inside: Callable[[Array, Array], Array]
    tone: Callable[[Array, Array], Array]


def _disc(u: Array, v: Array) -> Array:
    return np.hypot(u, v) <= 1


def _box(u: Array, v: Array) -> Array:
    return np.maximum(np.abs(u), np.abs(v)) <= 1


def _teeth(u: Array, v: Array) -> Array:
    return _box(u, v) & (v >= -1 + 0.9 * np.abs((u * 3) % 1 - 0.5) * 2)


def _wave(u: Array, v: Array) -> Array:
    return np.abs(v - 0.5 * np.sin(u * 1.5 * np.pi))


def _stripes(phase: Array) -> Array:
    """Alternates between 0 and 1 with every unit of ``phase``."""
    return (np.floor(phase) % 2).astype(np.float64)


def _spokes(u: Array, v: Array) -> Array:
    return _stripes((np.arctan2(v, u) / np.pi + 1) * 5)


def _checks(u: Array, v: Array) -> Array:
    return _stripes(np.floor((u + 1) * 2) + np.floor((v + 1) * 2))


def _planks(u: Array, v: Array) -> Array:
    diagonals = np.minimum(np.abs(u - v), np.abs(u + v)) < 0.25
    return ((np.maximum(np.abs(u), np.abs(v)) > 0.75) | diagonals).astype(np.float64)


SHAPE_CLASSES = (
    ShapeClass("target", (0.85, 1.2), 0, _disc, lambda u, v: _stripes(np.hypot(u, v) * 4)),
    ShapeClass("wheel", (0.85, 1.2), 180, _disc, _spokes),
    ShapeClass("board", (0.85, 1.2), 60, _box, _checks),
    ShapeClass("crate", (0.85, 1.2), 240, _box, _planks),
    ShapeClass("pole", (0.2, 0.35), 120, _box, lambda u, v: _stripes((v + 1) * 4)),
    ShapeClass("candle", (0.2, 0.35), 300, _box, lambda u, v: _stripes((u + 1) * 2 + (v + 1) * 3)),
    ShapeClass("saw", (2.5, 4.0), 30, _teeth, lambda u, v: (v > 0.4).astype(np.float64)),
    ShapeClass(
        "wave",
        (2.5, 4.0),
        210,
        lambda u, v: (_wave(u, v) <= 0.5) & (np.abs(u) <= 1),
        lambda u, v: (_wave(u, v) <= 0.2).astype(np.float64),
    ),
)
# Objects of no class: the same outlines without the textures, never annotated.
DISTRACTORS = (
    ShapeClass("plain disc", (0.7, 1.4), None, _disc, lambda u, v: (v + 1) / 2),
    ShapeClass("plain box", (0.25, 4.0), None, _box, lambda u, v: (u + 1) / 2),
)


@dataclass(frozen=True)
class DemoOptions:
    """What determines every pixel of a demo set."""

    seed: int = 0
    train_images: int = 320
    val_images: int = 80
    version: int = 2  # raised whenever the drawing changes


def make_demo_set(output: str | Path, options: DemoOptions = DemoOptions()) -> DetectionSet:
    """Draw ``images/``, ``train.json`` and ``val.json`` into ``output``, unless they are there.

    The set is drawn beside ``output`` and renamed when whole.

    Raises:
        ConfigError: ``output`` holds a demo set drawn with other options.
        DataError: it holds something else.
    """
    output = Path(output)
    known = output / "demo.json"
    if known.is_file():
        check_same(json.loads(known.read_text()), asdict(options), output)
        return DetectionSet.from_folder(output)
    if output.exists():
        raise DataError(f"{output} exists and is no demo set: choose another folder")
    part = output.with_name(output.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "images").mkdir(parents=True)
    for split, count in enumerate((options.train_images, options.val_images)):
        content = _draw_split(part, options.seed, split, count)
        (part / f"{SPLITS[split]}.json").write_text(json.dumps(content))
    (part / "demo.json").write_text(json.dumps(asdict(options)))
    part.rename(output)
    return DetectionSet.from_folder(output)


def _draw_split(folder: Path, seed: int, split: int, count: int) -> dict:
    """Write the images of a split; its COCO document."""
    images, annotations = [], []
    for number in range(count):
        pixels, found = draw_demo_image(seed, split, number)
        name, (height, width) = f"{SPLITS[split]}_{number:05d}.jpg", pixels.shape[:2]
        path = str(folder / "images" / name)
        cv2.imwrite(path, pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
        images.append({"id": number + 1, "file_name": name, "height": height, "width": width})
        annotations += [{"image_id": number + 1, **annotation} for annotation in found]
    return {
        "info": {"description": "jigsaw_d2 demo set, drawn from a seed"},
        "images": images,
        "annotations": [{"id": i, **entry} for i, entry in enumerate(annotations, start=1)],
        "categories": [
            {"id": i, "name": shape.name, "supercategory": "shape"}
            for i, shape in enumerate(SHAPE_CLASSES, start=1)
        ],
    }


@dataclass
class Scene:
    """One image while it is drawn; ``owner`` (h, w) int16 tells whose pixel is seen, 0 = ground."""

    image: Array
    owner: Array
    classes: list[int] = field(default_factory=list)
    areas: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Patch:
    """An object before it is painted: where (slices), how much of each pixel, in what."""

    window: tuple[slice, slice]
    cover: Array  # float64 (h, w) in 0..1
    colour: Array  # float64 (h, w, 3) in 0..255

    def mask(self, shape: tuple[int, int]) -> Array:
        """bool ``shape``: the pixels that the object covers by half or more."""
        full = np.zeros(shape, dtype=bool)
        full[self.window] = self.cover >= 0.5
        return full

    def paint(self, image: Array) -> None:
        """Onto float64 (H, W, 3), in place."""
        cover = self.cover[..., None]
        image[self.window] = image[self.window] * (1 - cover) + self.colour * cover


def draw_demo_image(seed: int, split: int, number: int) -> tuple[Array, list[dict]]:
    """Image ``number`` of a split (0 train, 1 val).

    Returns:
        uint8 (h, w, 3) RGB with sides of 160 to 200 pixels, and its annotations: dicts with
        "category_id" (from 1), "bbox" XYWH and "area" in pixels of what is visible, "iscrowd",
        "segmentation" (polygons; uncompressed RLE for a crowd).
    """
    rng = np.random.default_rng([seed, split, number])
    height, width = (int(side) for side in rng.integers(160, 201, size=2))
    scene = Scene(_ground(height, width, rng), np.zeros((height, width), np.int16))
    for _ in range(rng.integers(1, 4)):
        _place(scene, -1, rng, rng.uniform(20, 80))
    annotations = [_draw_crowd(scene, rng)] if rng.random() < CROWD_SHARE else []
    for _ in range(rng.integers(2, 7)):
        category = int(rng.integers(len(SHAPE_CLASSES)))
        # Many small ones, few large; the size is the square root of the area, in pixels.
        _place(scene, category, rng, float(np.exp(rng.uniform(np.log(20), np.log(90)))))
    light = np.linspace(*rng.uniform(0.6, 1.2, size=2), width)[None, :, None]
    noise = rng.normal(0, 6, size=scene.image.shape)
    for owner, category in enumerate(scene.classes, start=1):
        entry = _describe(scene.owner == owner, category)
        annotations.append({**entry, "iscrowd": 0, "segmentation": _polygons(scene.owner == owner)})
    return np.clip(scene.image * light + noise, 0, 255).astype(np.uint8), annotations


def _ground(height: int, width: int, rng: np.random.Generator) -> Array:
    """Noise of several wavelengths between two colours, float64 (height, width, 3)."""
    tone = np.zeros((height, width))
    for cells in (3, 8, 24, 64):
        coarse = rng.uniform(-1, 1, size=(cells, cells))
        tone += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) * cells**-0.4
    return _blend((tone - tone.min()) / np.ptp(tone), rng)


def _blend(tone: Array, rng: np.random.Generator, hue: int | None = None) -> Array:
    """Two random colours, far enough apart that a texture shows, mixed by ``tone``.

    ``hue``: about which the first lies, in degrees; None = anywhere.
    """
    while True:
        one, other = rng.uniform(0, 255, size=(2, 3))
        if hue is not None:
            turn = (hue + rng.uniform(-HUE_SPREAD, HUE_SPREAD)) % 360 / 360
            hsv = turn, rng.uniform(0.7, 1), rng.uniform(0.6, 1)
            one = 255 * np.array(colorsys.hsv_to_rgb(*hsv))
        if np.abs(one - other).sum() > 150:
            return one * (1 - tone[..., None]) + other * tone[..., None]


def _place(scene: Scene, category: int, rng: np.random.Generator, size: float) -> None:
    """Draw an object (a distractor for category -1) where it hides no other one too much."""
    shapes = DISTRACTORS if category < 0 else SHAPE_CLASSES[category : category + 1]
    shape = shapes[rng.integers(len(shapes))]
    height, width = scene.owner.shape
    for _ in range(10):
        patch = _draw(shape, (0, 0, width, height), rng, size)
        mask = patch.mask(scene.owner.shape)
        visible = np.bincount(scene.owner[~mask], minlength=len(scene.areas) + 1)[1:]
        if min(mask.any(axis=1).sum(), mask.any(axis=0).sum()) < MIN_SIDE:
            continue
        if (visible < MIN_VISIBLE * np.array(scene.areas)).any():
            continue
        patch.paint(scene.image)
        if category >= 0:
            scene.classes.append(category)
            scene.areas.append(int(mask.sum()))
            scene.owner[mask] = len(scene.classes)
        return


def _draw(
    shape: ShapeClass, frame: tuple[int, int, int, int], rng: np.random.Generator, size: float
) -> Patch:
    """An object of area ``size``**2 pixels somewhere in ``frame`` (XYXY pixels of the image)."""
    aspect = np.exp(rng.uniform(*np.log(shape.aspect)))
    half = size / 2 * np.array([aspect**0.5, aspect**-0.5])
    low, high = np.array(frame[:2]), np.array(frame[2:])
    # A twentieth of an object at most leaves the frame, so that its texture stays visible.
    reach = np.minimum(half * 0.9, (high - low) / 2)
    centre = rng.uniform(low + reach, high - reach)
    angle = rng.normal(0, np.deg2rad(6))
    radius = np.hypot(*half)
    left, top = np.maximum(np.floor(centre - radius), low).astype(int)
    right, bottom = np.minimum(np.ceil(centre + radius), high).astype(int)
    k = SUPERSAMPLING
    x = (np.arange((right - left) * k) + 0.5) / k + left - centre[0]
    y = ((np.arange((bottom - top) * k) + 0.5) / k + top - centre[1])[:, None]
    u = (x * np.cos(angle) + y * np.sin(angle)) / half[0]
    v = (y * np.cos(angle) - x * np.sin(angle)) / half[1]

    def shrunk(fine: Array) -> Array:
        return fine.reshape(bottom - top, k, right - left, k).mean(axis=(1, 3))

    colour = _blend(shrunk(np.clip(shape.tone(u, v), 0, 1)), rng, shape.hue)
    window = (slice(top, bottom), slice(left, right))
    return Patch(window, shrunk(shape.inside(u, v).astype(np.float64)), colour)


def _draw_crowd(scene: Scene, rng: np.random.Generator) -> dict:
    """Many small objects of one class, crammed together under a single crowd annotation."""
    category = int(rng.integers(len(SHAPE_CLASSES)))
    height, width = scene.owner.shape
    side = rng.integers(50, 80, size=2)
    left, top = (int(value) for value in rng.integers(0, np.array([width, height]) - side))
    frame = (left, top, left + int(side[0]), top + int(side[1]))
    together = np.zeros((height, width), dtype=bool)
    for _ in range(12):
        patch = _draw(SHAPE_CLASSES[category], frame, rng, 16)
        patch.paint(scene.image)
        together |= patch.mask(together.shape)
    return {**_describe(together, category), "iscrowd": 1, "segmentation": _rle(together)}


def _describe(mask: Array, category: int) -> dict:
    """Category, tight box and area of a mask that is nowhere empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    box = [float(value) for value in box]
    return {"category_id": category + 1, "bbox": box, "area": float(mask.sum())}


def _polygons(mask: Array) -> list[list[float]]:
    """Outlines of a mask as COCO writes them; the tight box's if all are too small."""
    found = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0]
    polygons = [contour.reshape(-1).astype(float).tolist() for contour in found if len(contour) > 2]
    x, y, w, h = _describe(mask, 0)["bbox"]
    return polygons or [[x, y, x + w, y, x + w, y + h, x, y + h]]


def _rle(mask: Array) -> dict:
    """Uncompressed run lengths, column by column, zeros first: COCO's form for crowds."""
    runs = [(value, len([*pixels])) for value, pixels in itertools.groupby(mask.T.reshape(-1))]
    counts = [length for _, length in runs]
    return {"size": list(mask.shape), "counts": [0, *counts] if runs[0][0] else counts}

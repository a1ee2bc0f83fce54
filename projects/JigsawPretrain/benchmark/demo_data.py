"""A detection set drawn from a seed: COCO format, eight classes, textures, overlaps, crowds.

It exists so that the whole pipeline can be tried, and tested, where no dataset is at hand. An image
depends on (seed, split, its number) alone: the first 100 images of a set of 320 are those of a set
of 100. Pairs of classes share a silhouette and differ in texture alone, and colours are drawn
without regard to the class, so that neither the outline nor the colour tells what an object is.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np

from jigsaw_d2.io import DataError
from jigsaw_d2.tools.run import say
from jigsaw_d2.tools.stages import DetectionSet, check_same

Array = np.ndarray
SPLITS = ("train", "val")
CROWD_SHARE = 0.06  # of the images
MIN_VISIBLE = 0.5  # of each object's pixels, whatever is drawn over it later
MIN_SIDE = 12  # pixels; smaller objects have no texture to tell them by
SUPERSAMPLING = 2


@dataclass(frozen=True)
class ShapeClass:
    """One category: its name, the range of width / height it is drawn with, and how it looks.

    ``draw`` takes object coordinates u, v (float arrays of one shape; -1..1 over the object's width
    and height, v downwards) and returns its silhouette (bool) and its texture (float tone in 0..1
    that blends the object's two colours), both of that shape.
    """

    name: str
    aspect: tuple[float, float]
    draw: Callable[[Array, Array], tuple[Array, Array]]


def _stripes(phase: Array) -> Array:
    """Tone that alternates between 0 and 1 with every unit of ``phase``."""
    return (np.floor(phase) % 2).astype(np.float64)


def _target(u: Array, v: Array) -> tuple[Array, Array]:
    radius = np.hypot(u, v)
    return radius <= 1, _stripes(radius * 4)


def _wheel(u: Array, v: Array) -> tuple[Array, Array]:
    return np.hypot(u, v) <= 1, _stripes((np.arctan2(v, u) / np.pi + 1) * 5)


def _square(u: Array, v: Array) -> Array:
    return np.maximum(np.abs(u), np.abs(v)) <= 1


def _board(u: Array, v: Array) -> tuple[Array, Array]:
    return _square(u, v), _stripes(np.floor((u + 1) * 2) + np.floor((v + 1) * 2))


def _crate(u: Array, v: Array) -> tuple[Array, Array]:
    frame = np.maximum(np.abs(u), np.abs(v)) > 0.75
    diagonals = np.minimum(np.abs(u - v), np.abs(u + v)) < 0.25
    return _square(u, v), (frame | diagonals).astype(np.float64)


def _pole(u: Array, v: Array) -> tuple[Array, Array]:
    return _square(u, v), _stripes((v + 1) * 4)


def _candle(u: Array, v: Array) -> tuple[Array, Array]:
    return _square(u, v), _stripes((u + 1) * 2 + (v + 1) * 3)


def _saw(u: Array, v: Array) -> tuple[Array, Array]:
    teeth = np.abs((u * 3) % 1 - 0.5) * 2
    return _square(u, v) & (v >= -1 + 0.9 * teeth), (v > 0.4).astype(np.float64)


def _wave(u: Array, v: Array) -> tuple[Array, Array]:
    distance = np.abs(v - 0.5 * np.sin(u * 1.5 * np.pi))
    return (distance <= 0.5) & (np.abs(u) <= 1), (distance <= 0.2).astype(np.float64)


def _plain_disc(u: Array, v: Array) -> tuple[Array, Array]:
    return np.hypot(u, v) <= 1, (v + 1) / 2


def _plain_box(u: Array, v: Array) -> tuple[Array, Array]:
    return _square(u, v), (u + 1) / 2


SHAPE_CLASSES = (
    ShapeClass("target", (0.85, 1.2), _target),
    ShapeClass("wheel", (0.85, 1.2), _wheel),
    ShapeClass("board", (0.85, 1.2), _board),
    ShapeClass("crate", (0.85, 1.2), _crate),
    ShapeClass("pole", (0.2, 0.35), _pole),
    ShapeClass("candle", (0.2, 0.35), _candle),
    ShapeClass("saw", (2.5, 4.0), _saw),
    ShapeClass("wave", (2.5, 4.0), _wave),
)

# Objects of no class: the same outlines without the textures, never annotated.
DISTRACTORS = (
    ShapeClass("plain disc", (0.7, 1.4), _plain_disc),
    ShapeClass("plain box", (0.25, 4.0), _plain_box),
)


@dataclass(frozen=True)
class DemoOptions:
    """What determines every pixel of a demo set."""

    seed: int = 0
    train_images: int = 320
    val_images: int = 80
    version: int = 1  # raised whenever the drawing changes


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


@dataclass
class Scene:
    """One image while it is drawn; ``owner`` (h, w) int16 tells whose pixel is seen, 0 = ground."""

    image: Array
    owner: Array
    classes: list[int]
    areas: list[int]


def make_demo_set(
    output: str | Path,
    options: DemoOptions = DemoOptions(),
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> Path:
    """Write ``images/``, ``train.json`` and ``val.json`` into ``output``, unless it has them.

    The set is drawn beside ``output`` and renamed when whole.

    Args:
        progress: called with (images done, images in all).

    Returns:
        ``output``.

    Raises:
        ConfigError: ``output`` holds a demo set drawn with other options.
        DataError: it holds something else.
    """
    output = Path(output)
    known = output / "demo.json"
    if known.is_file():
        check_same(json.loads(known.read_text()), asdict(options), output)
        return output
    if output.exists():
        raise DataError(f"{output} exists and is no demo set: choose another folder")
    part = output.with_name(output.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "images").mkdir(parents=True)
    counts = (options.train_images, options.val_images)
    for split, count in enumerate(counts):
        records = []
        for number in range(count):
            records.append(_write_image(part, options.seed, split, number))
            progress(number + 1 + split * counts[0], sum(counts))
        (part / f"{SPLITS[split]}.json").write_text(json.dumps(_coco_document(records)))
    (part / "demo.json").write_text(json.dumps(asdict(options)))
    part.rename(output)
    return output


def demo_dataset(folder: Path) -> DetectionSet:
    """The set of the default options in ``folder``, drawn unless it is there already."""

    def progress(done: int, count: int) -> None:
        if done % 100 == 0 or done == count:
            say(f"draw the set: {done} of {count} images")

    return DetectionSet.from_folder(make_demo_set(folder, progress=progress))


def draw_demo_image(seed: int, split: int, number: int) -> tuple[Array, list[dict]]:
    """Image ``number`` of a split (0 train, 1 val).

    Returns:
        uint8 (h, w, 3) RGB with sides of 160 to 200 pixels, and its annotations: dicts with
        "category_id" (from 1), "bbox" XYWH and "area" in pixels of what is visible, "iscrowd",
        "segmentation" (polygons; uncompressed RLE for a crowd).
    """
    rng = np.random.default_rng([seed, split, number])
    height, width = (int(side) for side in rng.integers(160, 201, size=2))
    scene = Scene(_ground(height, width, rng), np.zeros((height, width), np.int16), [], [])
    for _ in range(rng.integers(1, 4)):
        _place(scene, -1, rng, rng.uniform(20, 80))
    crowd = _draw_crowd(scene, rng) if rng.random() < CROWD_SHARE else None
    for _ in range(rng.integers(2, 7)):
        _place(scene, int(rng.integers(len(SHAPE_CLASSES))), rng, _object_size(rng))
    light = np.linspace(*rng.uniform(0.6, 1.2, size=2), width)[None, :, None]
    noise = rng.normal(0, 6, size=scene.image.shape)
    image = np.clip(scene.image * light + noise, 0, 255).astype(np.uint8)
    return image, _annotations(scene, crowd)


def _object_size(rng: np.random.Generator) -> float:
    """Square root of the object's area, in pixels: many small ones, few large."""
    return float(np.exp(rng.uniform(np.log(20), np.log(90))))


def _ground(height: int, width: int, rng: np.random.Generator) -> Array:
    """Noise of several wavelengths between two colours, float64 (height, width, 3)."""
    tone = np.zeros((height, width))
    for cells in (3, 8, 24, 64):
        coarse = rng.uniform(-1, 1, size=(cells, cells))
        tone += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) * cells**-0.4
    tone = (tone - tone.min()) / np.ptp(tone)
    return _blend(tone, _two_colours(rng))


def _two_colours(rng: np.random.Generator) -> Array:
    """float64 (2, 3), 0..255, far enough apart that a texture shows."""
    while True:
        colours = rng.uniform(0, 255, size=(2, 3))
        if np.abs(colours[0] - colours[1]).sum() > 150:
            return colours


def _blend(tone: Array, colours: Array) -> Array:
    return colours[0] * (1 - tone[..., None]) + colours[1] * tone[..., None]


def _place(scene: Scene, category: int, rng: np.random.Generator, size: float) -> None:
    """Draw an object (a distractor for category -1) where it hides no other one too much."""
    shapes = DISTRACTORS if category < 0 else SHAPE_CLASSES[category : category + 1]
    shape = shapes[rng.integers(len(shapes))]
    height, width = scene.owner.shape
    for _ in range(10):
        patch = _draw(shape, (0, 0, width, height), rng, size)
        mask = patch.mask(scene.owner.shape)
        if not _is_fit(mask) or _hides_too_much(scene, mask):
            continue
        _paint(scene, patch)
        if category >= 0:
            scene.classes.append(category)
            scene.areas.append(int(mask.sum()))
            scene.owner[mask] = len(scene.classes)
        return


def _is_fit(mask: Array) -> bool:
    """Whether an object's sides are long enough to be told by its texture."""
    return min(mask.any(axis=1).sum(), mask.any(axis=0).sum()) >= MIN_SIDE


def _hides_too_much(scene: Scene, mask: Array) -> bool:
    visible = np.bincount(scene.owner[~mask], minlength=len(scene.areas) + 1)[1:]
    return bool((visible < MIN_VISIBLE * np.array(scene.areas)).any())


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
    inside, tone = shape.draw(u, v)
    colour = _blend(_downsample(np.clip(tone, 0, 1)), _two_colours(rng))
    window = (slice(top, bottom), slice(left, right))
    return Patch(window, _downsample(inside.astype(np.float64)), colour)


def _downsample(fine: Array) -> Array:
    k = SUPERSAMPLING
    return fine.reshape(fine.shape[0] // k, k, fine.shape[1] // k, k).mean(axis=(1, 3))


def _paint(scene: Scene, patch: Patch) -> None:
    below, cover = scene.image[patch.window], patch.cover[..., None]
    scene.image[patch.window] = below * (1 - cover) + patch.colour * cover


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
        _paint(scene, patch)
        together |= patch.mask(together.shape)
    return {**_describe(together, category), "iscrowd": 1, "segmentation": _rle(together)}


def _annotations(scene: Scene, crowd: dict | None) -> list[dict]:
    found = [] if crowd is None else [crowd]
    for number, category in enumerate(scene.classes, start=1):
        visible = scene.owner == number
        polygons = _polygons(visible)
        found.append({**_describe(visible, category), "iscrowd": 0, "segmentation": polygons})
    return found


def _describe(mask: Array, category: int) -> dict:
    """Category, tight box and area of a mask that is nowhere empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    return {
        "category_id": category + 1,
        "bbox": [float(value) for value in box],
        "area": float(mask.sum()),
    }


def _polygons(mask: Array) -> list[list[float]]:
    """Outlines of a mask as COCO writes them; the tight box's if all are too small."""
    found = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0]
    polygons = [contour.reshape(-1).astype(float).tolist() for contour in found if len(contour) > 2]
    if polygons:
        return polygons
    x, y, w, h = _describe(mask, 0)["bbox"]
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def _rle(mask: Array) -> dict:
    """Uncompressed run lengths, column by column, zeros first: COCO's form for crowds."""
    flat = np.concatenate([[False], mask.T.reshape(-1), [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], edges, [mask.size]]))
    return {"size": list(mask.shape), "counts": counts[: len(edges) + 1].tolist()}


def _write_image(folder: Path, seed: int, split: int, number: int) -> tuple[dict, list[dict]]:
    image, annotations = draw_demo_image(seed, split, number)
    name = f"{SPLITS[split]}_{number:05d}.jpg"
    cv2.imwrite(str(folder / "images" / name), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
    height, width = image.shape[:2]
    return {"id": number + 1, "file_name": name, "height": height, "width": width}, annotations


def _coco_document(records: list[tuple[dict, list[dict]]]) -> dict:
    annotations = [
        {"image_id": image["id"], **annotation} for image, found in records for annotation in found
    ]
    return {
        "info": {"description": "jigsaw_d2 demo set, drawn from a seed"},
        "images": [image for image, _ in records],
        "annotations": [{"id": i, **entry} for i, entry in enumerate(annotations, start=1)],
        "categories": [
            {"id": i, "name": shape.name, "supercategory": "shape"}
            for i, shape in enumerate(SHAPE_CLASSES, start=1)
        ],
    }

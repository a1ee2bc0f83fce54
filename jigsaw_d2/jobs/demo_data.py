"""A detection set drawn from a seed: COCO format, eight classes, textures, overlaps, crowds.

It exists so that the whole pipeline can be tried, and tested, where no dataset is at hand. An image
depends on (seed, split, its number) alone: the first 100 images of a set of 320 are those of a set
of 100.
"""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np

from jigsaw_d2.jobs.demo_shapes import DISTRACTORS, SHAPE_CLASSES, ShapeClass

logger = logging.getLogger(__name__)

SPLITS = ("train", "val")
CROWD_SHARE = 0.06  # of the images
MIN_VISIBLE = 0.5  # of each object's pixels, whatever is drawn over it later
MIN_SIDE = 12  # pixels; smaller objects have no texture to tell them by
SUPERSAMPLING = 2


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
    cover: np.ndarray  # float64 (h, w) in 0..1
    colour: np.ndarray  # float64 (h, w, 3) in 0..255

    def mask(self, shape: tuple[int, int]) -> np.ndarray:
        """bool ``shape``: the pixels that the object covers by half or more."""
        full = np.zeros(shape, dtype=bool)
        full[self.window] = self.cover >= 0.5
        return full


@dataclass
class Scene:
    """One image while it is drawn; ``owner`` (h, w) int16 tells whose pixel is seen, 0 = ground."""

    image: np.ndarray
    owner: np.ndarray
    classes: list[int]
    areas: list[int]


def make_demo_set(
    output: str | Path,
    options: DemoOptions = DemoOptions(),
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write ``images/``, ``train.json`` and ``val.json`` into ``output``, unless it has them.

    The set is drawn beside ``output`` and renamed when whole. A folder made with other options is
    replaced; one that this function did not make is left alone.

    Args:
        progress: called with (images done, images in all).

    Returns:
        ``output``.

    Raises:
        FileExistsError: ``output`` exists and holds something else than a demo set.
    """
    output = Path(output)
    if demo_options(output) == asdict(options):
        return output
    if output.exists() and demo_options(output) is None:
        raise FileExistsError(f"{output} exists and is no demo set: choose another folder")
    part = output.with_name(output.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "images").mkdir(parents=True)
    counts = (options.train_images, options.val_images)
    done = 0
    for split, count in enumerate(counts):
        records = []
        for number in range(count):
            records.append(_write_image(part, options.seed, split, number))
            done += 1
            if progress is not None:
                progress(done, sum(counts))
        (part / f"{SPLITS[split]}.json").write_text(json.dumps(_coco_document(records)))
    (part / "demo.json").write_text(json.dumps(asdict(options)))
    shutil.rmtree(output, ignore_errors=True)
    part.rename(output)
    logger.info("drew %d images into %s", done, output)
    return output


def demo_options(folder: str | Path) -> dict | None:
    """Options a demo set was drawn with; None where ``folder`` is not one."""
    path = Path(folder) / "demo.json"
    return json.loads(path.read_text()) if path.is_file() else None


def draw_demo_image(seed: int, split: int, number: int) -> tuple[np.ndarray, list[dict]]:
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


def _ground(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of several wavelengths between two colours, float64 (height, width, 3)."""
    tone = np.zeros((height, width))
    for cells in (3, 8, 24, 64):
        coarse = rng.uniform(-1, 1, size=(cells, cells))
        tone += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) * cells**-0.4
    tone = (tone - tone.min()) / np.ptp(tone)
    return _blend(tone, _two_colours(rng))


def _two_colours(rng: np.random.Generator) -> np.ndarray:
    """float64 (2, 3), 0..255, far enough apart that a texture shows."""
    while True:
        colours = rng.uniform(0, 255, size=(2, 3))
        if np.abs(colours[0] - colours[1]).sum() > 150:
            return colours


def _blend(tone: np.ndarray, colours: np.ndarray) -> np.ndarray:
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


def _is_fit(mask: np.ndarray) -> bool:
    """Whether an object's sides are long enough to be told by its texture."""
    return min(mask.any(axis=1).sum(), mask.any(axis=0).sum()) >= MIN_SIDE


def _hides_too_much(scene: Scene, mask: np.ndarray) -> bool:
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


def _downsample(fine: np.ndarray) -> np.ndarray:
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


def _describe(mask: np.ndarray, category: int) -> dict:
    """Category, tight box and area of a mask that is nowhere empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    return {
        "category_id": category + 1,
        "bbox": [float(value) for value in box],
        "area": float(mask.sum()),
    }


def _polygons(mask: np.ndarray) -> list[list[float]]:
    """Outlines of a mask as COCO writes them; the tight box's if all are too small."""
    found = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0]
    polygons = [contour.reshape(-1).astype(float).tolist() for contour in found if len(contour) > 2]
    if polygons:
        return polygons
    x, y, w, h = _describe(mask, 0)["bbox"]
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def _rle(mask: np.ndarray) -> dict:
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

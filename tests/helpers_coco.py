"""Small COCO-format sets for tests, drawn from a seed."""

import json
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

CATEGORY_IDS = (1, 3, 7)  # gaps, as in COCO


def draw_scene(size: tuple[int, int], count: int, rng: np.random.Generator) -> tuple:
    """(uint8 RGB image, [(XYWH box, class index)]): coloured blocks of all three shape groups."""
    height, width = size
    image = rng.integers(60, 120, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
    objects = []
    for n in range(count):
        long, short = rng.integers(30, 60), rng.integers(10, 14)
        w, h = [(long, long), (short, long), (long, short)][n % 3]
        x, y = rng.integers(0, width - w), rng.integers(0, height - h)
        label = int(rng.integers(0, 3))
        colour = np.array([40, 40, 40])
        colour[label] = 230
        image[y : y + h, x : x + w] = colour
        objects.append(([float(x), float(y), float(w), float(h)], label))
    return image, objects


def make_coco(
    folder: Path, images: int = 12, seed: int = 0, size: tuple[int, int] = (180, 240)
) -> Path:
    """Write images/, train.json and val.json (a third as many images); returns ``folder``.

    Every image has 4 objects; the first has a crowd as well, the last has none at all, so that val
    has an object where ``images`` is 6 or more.
    """
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    for split, count in (("train", images), ("val", max(images // 3, 1))):
        entries, annotations = [], []
        for n in range(count):
            image, objects = draw_scene(size, 0 if n == count - 1 else 4, rng)
            name = f"{split}_{n:03d}.jpg"
            cv2.imwrite(str(folder / "images" / name), image[..., ::-1])
            entries.append(
                {"id": 10 * n + 5, "file_name": name, "height": size[0], "width": size[1]}
            )
            for box, label in objects:
                one = annotation(entries[-1]["id"], box, CATEGORY_IDS[label])
                annotations.append({**one, "area": box[2] * box[3]})
            if n == 0:
                annotations.append(annotation(entries[-1]["id"], [100, 10, 90, 60], 1, crowd=1))
        write_json(folder / f"{split}.json", entries, annotations)
    return folder


def annotation(image_id: int, box: list, category: int = 1, crowd: int = 0) -> dict:
    """One COCO annotation without its id, which ``write_json`` gives."""
    return {"image_id": image_id, "bbox": box, "category_id": category, "iscrowd": crowd}


def write_json(path: Path, images: list[dict], annotations: list[dict]) -> Path:
    """A COCO json with the three categories; annotations are numbered unless they have an id."""
    annotations = [{"id": n, **entry} for n, entry in enumerate(annotations, 1)]
    categories = [{"id": i, "name": f"kind{n}"} for n, i in enumerate(CATEGORY_IDS)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
    return path


def make_bad_coco(folder: Path) -> tuple[Path, Path]:
    """(json, image folder) with one image or annotation for each fault there is."""
    make_coco(folder)
    images, annotations = [], []

    def add(name: str, size: tuple[int, int] = (60, 80), image_id: int | None = None) -> int:
        number = 1000 + len(images) if image_id is None else image_id
        images.append({"id": number, "file_name": name, "height": size[0], "width": size[1]})
        return number

    picture = Image.new("RGB", (80, 60), (200, 30, 30))
    for name in ("good.jpg", "cut.jpg", "other_size.jpg"):
        picture.save(folder / "images" / name)
    whole = (folder / "images" / "cut.jpg").read_bytes()
    (folder / "images" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "images" / "empty.jpg").touch()
    (folder / "images" / "text.jpg").write_text("no image")
    deep = np.arange(4800, dtype=np.uint16).reshape(60, 80) * 10
    Image.fromarray(deep).save(folder / "images" / "deep.png")
    for mode in ("L", "P", "CMYK", "RGBA"):
        picture.convert(mode).save(folder / "images" / f"{mode}.tiff")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "images" / "turned.jpg", exif=exif)
    for name in ("gone.jpg", "cut.jpg", "empty.jpg", "text.jpg", "deep.png"):
        annotations.append(annotation(add(name), [10, 10, 30, 30]))
    annotations.append(annotation(add("other_size.jpg", (80, 60)), [10, 10, 30, 30]))
    for mode in ("L", "P", "CMYK", "RGBA"):
        annotations.append(annotation(add(f"{mode}.tiff"), [10, 10, 30, 30]))
    annotations.append(annotation(add("turned.jpg", (80, 60)), [10, 10, 20, 60]))
    good = add("good.jpg")
    for box in ([0, 0, 0, 9], [0, 0, -3, 9], [90, 0, 9, 9], [float("nan"), 0, 9, 9], [5, 5, 1, 1]):
        annotations.append(annotation(good, box))
    annotations += [annotation(good, [60, 40, 50, 50]), annotation(good, [10, 10, 20, 20], 99)]
    annotations += [annotation(good, [1, 1, 9, 9], crowd=1), annotation(31337, [0, 0, 9, 9])]
    annotations.append(annotation(add("good.jpg"), [60, 40, 50, 50]))
    add("new.jpg", image_id=good)
    annotations.append(annotation(add("train_000.jpg", (180, 240)), [0, 0, 240, 180]))
    return write_json(folder / "bad.json", images, annotations), folder / "images"

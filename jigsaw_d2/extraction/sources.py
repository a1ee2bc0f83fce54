"""Detection sets -> plain arrays: a COCO json with its image folder, or a registered dataset."""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from jigsaw_d2.extraction.coco_json import CocoAnnotation, CocoCategory, read_coco_json
from jigsaw_d2.extraction.log import ExtractionError, ExtractionLog

UNKNOWN_CLASS = -1


@dataclass
class SourceImage:
    """One image and what is annotated on it, as the dataset says it, unchecked."""

    image_id: int
    path: str
    size: tuple[int, int] | None  # (height, width) by the dataset
    boxes: list = field(default_factory=list)  # XYXY source pixels, four floats each
    classes: list = field(default_factory=list)  # contiguous index, or UNKNOWN_CLASS
    crowds: list = field(default_factory=list)  # bool

    def add(self, box: list[float], class_index: int, crowd: bool) -> None:
        """Append one annotation."""
        self.boxes.append(box)
        self.classes.append(class_index)
        self.crowds.append(crowd)


@dataclass
class SourceData:
    """A whole detection set."""

    categories: list[str]  # names in class order, without background
    category_ids: list[int]  # the dataset's own ids, in class order
    images: list[SourceImage]  # sorted by image id, one per file

    def content_hash(self) -> str:
        """SHA-256 over categories, image ids, file names and annotations."""
        digest = hashlib.sha256(json.dumps([self.categories, self.category_ids]).encode())
        for image in self.images:
            digest.update(f"{image.image_id} {os.path.basename(image.path)} {image.size}".encode())
            digest.update(np.array(image.boxes, np.float64).tobytes())
            digest.update(np.array(image.classes, np.int64).tobytes())
            digest.update(np.array(image.crowds, bool).tobytes())
        return digest.hexdigest()


class Source(Protocol):
    """Where a detection set comes from."""

    name: str

    def load(self, log: ExtractionLog) -> SourceData:
        """Read it, logging what it skips."""


def image_number(image_id: object) -> int:
    """The image id as an int64: itself where it is a whole number, else a hash of its text."""
    try:
        number = int(image_id)
        if -(2**63) <= number < 2**63 and str(number) == str(image_id):
            return number
    except (TypeError, ValueError):
        pass
    return int.from_bytes(hashlib.sha256(str(image_id).encode()).digest()[:7], "big")


def box_or_nan(values: object) -> list[float]:
    """Four floats, NaN where ``values`` is anything else."""
    try:
        x0, y0, x1, y1 = values
        return [float(x0), float(y0), float(x1), float(y1)]
    except (TypeError, ValueError):
        return [float("nan")] * 4


class _ImageTable:
    """Collects images and annotations; resolves repeated ids, files and annotations."""

    def __init__(self, log: ExtractionLog) -> None:
        self.log = log
        self.by_id: dict[object, SourceImage] = {}
        self._by_path: dict[str, SourceImage] = {}
        self._numbers: set[int] = set()

    def add_image(
        self, image_id: object, path: str, size: tuple[int, int] | None
    ) -> SourceImage | None:
        """The entry that takes this image's annotations; None where the image is skipped."""
        number = image_number(image_id)
        if path in self._by_path:
            self.log.add("image_listed_twice", path)
            return self.by_id.setdefault(image_id, self._by_path[path])
        if image_id in self.by_id or number in self._numbers:
            self.log.add("image_id_repeated", path)
            return None
        self._numbers.add(number)
        image = SourceImage(number, path, size)
        self.by_id[image_id] = self._by_path[path] = image
        return image

    def images(self) -> list[SourceImage]:
        """Sorted by id, exact repetitions of an annotation dropped."""
        for image in self._by_path.values():
            self._drop_repeated(image)
        return sorted(self._by_path.values(), key=lambda image: image.image_id)

    def _drop_repeated(self, image: SourceImage) -> None:
        seen, kept = set(), []
        for n, key in enumerate(zip(map(tuple, image.boxes), image.classes, image.crowds)):
            if key in seen:
                self.log.add("annotation_repeated", f"{image.path}: box {list(key[0])}")
            else:
                kept.append(n)
            seen.add(key)
        if len(kept) < len(image.boxes):
            image.boxes = [image.boxes[n] for n in kept]
            image.classes = [image.classes[n] for n in kept]
            image.crowds = [image.crowds[n] for n in kept]


class CocoSource:
    """A COCO-format json and the folder of its images.

    Args:
        json_file: with "images", "annotations", "categories".
        image_root: folder that the json's file names are relative to.
        name: of the dataset, for the header; the json's stem by default.
    """

    def __init__(self, json_file: str | Path, image_root: str | Path, name: str = "") -> None:
        self.json_file, self.image_root = Path(json_file), Path(image_root)
        self.name = name or self.json_file.stem

    def load(self, log: ExtractionLog) -> SourceData:
        """Read the json.

        Raises:
            ExtractionError: no json, or one that lacks a key; the message names file and key.
        """
        content = read_coco_json(self.json_file)
        if not self.image_root.is_dir():
            raise ExtractionError(f"image folder {self.image_root} does not exist")
        names, ids = self._read_categories(content.categories, log)
        table = _ImageTable(log)
        for entry in content.images:
            path = str(self.image_root / entry.file_name)
            table.add_image(entry.id, path, (entry.height, entry.width))
        self._read_annotations(content.annotations, table, ids, log)
        return SourceData(names, ids, table.images())

    def _read_categories(
        self, entries: list[CocoCategory], log: ExtractionLog
    ) -> tuple[list[str], list[int]]:
        """Names and ids sorted by id, as Detectron2 numbers classes."""
        names: dict[int, str] = {}
        for entry in entries:
            if entry.id in names:
                repeated = f"{self.json_file}: category {entry.id} {entry.name!r}"
                log.add("category_id_repeated", repeated)
            else:
                names[entry.id] = str(entry.name)
        ids = sorted(names)
        if not ids:
            raise ExtractionError(f'{self.json_file}: "categories" is empty, so there is no class')
        if ids[-1] - ids[0] + 1 != len(ids):
            log.add("category_ids_with_gaps", f"{len(ids)} ids from {ids[0]} to {ids[-1]}")
        return [names[i] for i in ids], ids

    def _read_annotations(
        self,
        entries: list[CocoAnnotation],
        table: _ImageTable,
        category_ids: list[int],
        log: ExtractionLog,
    ) -> None:
        classes = {category: n for n, category in enumerate(category_ids)}
        known: dict[object, tuple] = {}
        name = self.json_file.name
        for n, entry in enumerate(entries):
            image = table.by_id.get(entry.image_id)
            if image is None:
                number = n if entry.id is None else entry.id
                log.add("annotation_of_unknown_image", f"{name}: annotation {number}")
                continue
            x, y, width, height = box_or_nan(entry.bbox)
            box = [x, y, x + width, y + height]
            category = entry.category_id
            image.add(box, classes.get(category, UNKNOWN_CLASS), bool(entry.iscrowd))
            if entry.id is not None:
                content = (image.path, category, *box)
                if known.setdefault(entry.id, content) != content:
                    log.add("annotation_id_repeated", f"{name}: annotation {entry.id}")


class RegisteredSource:
    """A dataset registered in Detectron2's ``DatasetCatalog``, by its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def load(self, log: ExtractionLog) -> SourceData:
        """Read the dataset's dicts (Detectron2's standard format).

        Raises:
            ExtractionError: no such dataset, or a dict without a key that the format demands.
        """
        from detectron2.data import DatasetCatalog, MetadataCatalog

        if self.name not in DatasetCatalog.list():
            raise ExtractionError(
                f"no dataset {self.name!r} is registered with Detectron2; register it, or give "
                "--json and --images"
            )
        dicts = DatasetCatalog.get(self.name)
        table = _ImageTable(log)
        highest = -1
        for n, entry in enumerate(dicts):
            highest = max(highest, self._read_dict(entry, n, table))
        names = list(MetadataCatalog.get(self.name).get("thing_classes", []))
        if not names and highest < 0:
            raise ExtractionError(f"dataset {self.name!r} names no classes and holds no objects")
        names += [f"class{n}" for n in range(len(names), highest + 1)]
        mapping = MetadataCatalog.get(self.name).get("thing_dataset_id_to_contiguous_id", {})
        ids = [k for k, _ in sorted(mapping.items(), key=lambda item: item[1])]
        return SourceData(names, ids or list(range(len(names))), table.images())

    def _read_dict(self, entry: dict, number: int, table: _ImageTable) -> int:
        """Add one image with its annotations; returns its highest class, -1 without any."""
        from detectron2.structures import BoxMode

        if "file_name" not in entry:
            raise ExtractionError(f'dataset {self.name!r}: dict {number} lacks "file_name"')
        image_id = entry.get("image_id", number)
        size = (entry["height"], entry["width"]) if {"height", "width"} <= set(entry) else None
        image, highest = table.add_image(image_id, str(entry["file_name"]), size), -1
        for annotation in entry.get("annotations", []):
            for key in ("bbox", "bbox_mode", "category_id"):
                if key not in annotation:
                    raise ExtractionError(
                        f'dataset {self.name!r}: an annotation of dict {number} lacks "{key}"'
                    )
            box = [float(v) for v in annotation["bbox"]]
            box = BoxMode.convert(box, annotation["bbox_mode"], BoxMode.XYXY_ABS)
            class_index = int(annotation["category_id"])
            if image is not None:
                image.add(box_or_nan(box), class_index, bool(annotation.get("iscrowd", 0)))
            highest = max(highest, class_index)
        return highest

"""Detection sets -> checked records: a COCO json with its image folder, or a registered dataset.

What is odd in a set is read here, by one list of rules (``report.REASONS``), whoever asks: the
extraction, and ``cleaning`` for the detector's training and evaluation.
"""

import filecmp
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jigsaw_d2.data.report import ExtractionLog
from jigsaw_d2.io import ConfigError, DataError

if TYPE_CHECKING:
    from detectron2.config import CfgNode

UNKNOWN_CLASS = -1
CLEANED_FOLDER = "datasets"  # of OUTPUT_DIR, see detection/data.py
# What a COCO json must hold: of each entry these keys, with values of these types. What a value
# says is checked where it is used: a box, a size or a name may be wrong, an id may not.
ID = (int, float, str)
COCO_RULES = {
    "images": {"id": ID, "file_name": str},
    "annotations": {"image_id": ID, "category_id": (*ID, type(None)), "bbox": object},
    "categories": {"id": (int, float), "name": object},
}


class Annotation(NamedTuple):
    """One annotated object, as the dataset says it."""

    box: tuple[float, float, float, float]  # XYXY source pixels
    class_index: int  # contiguous, or UNKNOWN_CLASS
    crowd: bool


@dataclass
class SourceImage:
    """One image and what is annotated on it."""

    image_id: int
    path: str
    size: tuple[int, int] | None  # (height, width) by the dataset, if it says so
    annotations: list[Annotation] = field(default_factory=list)
    entries: list[dict] = field(default_factory=list)  # the same as they stand, where asked for


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
            columns = zip(*image.annotations) if image.annotations else ((), (), ())
            for column, dtype in zip(columns, (np.float64, np.int64, bool)):
                digest.update(np.array(column, dtype).tobytes())
        return digest.hexdigest()


def image_number(image_id: object) -> int:
    """The image id as an int64: itself where it is a whole number, else a hash of its text."""
    try:
        number = int(image_id)
        if -(2**63) <= number < 2**63 and (number == image_id or str(number) == image_id):
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    return int.from_bytes(hashlib.sha256(str(image_id).encode()).digest()[:7], "big")


def box_or_nan(values: object) -> tuple[float, float, float, float]:
    """Four floats, NaN where ``values`` is anything else."""
    try:
        a, b, c, d = map(float, values)
        return a, b, c, d
    except (TypeError, ValueError, OverflowError):
        return (float("nan"),) * 4


def is_set(flag: object) -> bool:
    """Whether a flag such as iscrowd is set: a number, or one as text; None is not."""
    return str(flag).strip().lower() not in ("0", "0.0", "", "false", "none")


def unique_names(names: list[str], log: ExtractionLog) -> list[str]:
    """Class names of which none says two classes: results are told apart by them."""
    unique: list[str] = []
    for name in names:
        n, free = 2, name
        while free in unique or (free != name and free in names):
            n, free = n + 1, f"{name} ({n})"
        if free != name:
            log.add("category_name_repeated", f"{name!r}: {free!r}")
        unique.append(free)
    return unique


def find_image(root: Path, name: str, log: ExtractionLog) -> str:
    """Path of an image that a json names as another machine had it, or as it stands."""
    path, other = root / name, PureWindowsPath(name)
    elsewhere = bool(other.anchor) or other.parts[:1] == ("..",)
    parts = other.parts[1:] if other.anchor else other.parts
    if not elsewhere and "\\" not in name and parts[:1] != (root.name,) or path.exists():
        return str(path)
    # As slashes; without the folder that was given already; by itself, from another machine.
    tried = [parts, *([parts[1:]] if parts[:1] == (root.name,) else [])]
    tried += [parts[-1:]] if elsewhere else []
    for found in (root.joinpath(*t) for t in tried):
        if found.is_file():
            log.add("image_path_mended", f"{name!r}: {found}")
            return str(found)
    return str(path)


class _ImageTable:
    """Collects images and annotations; resolves repeated ids, files and annotations."""

    def __init__(self, log: ExtractionLog) -> None:
        self.log = log
        self.by_id: dict[int, SourceImage] = {}  # by ``image_number``
        self._by_path: dict[str, SourceImage] = {}

    def add_image(
        self, image_id: object, path: str, size: tuple[int, int] | None
    ) -> SourceImage | None:
        """The entry that takes this image's annotations; None where the image is skipped."""
        number = image_number(image_id)
        if path in self._by_path:
            self.log.add("image_listed_twice", path)
            return self.by_id.setdefault(number, self._by_path[path])
        if number in self.by_id:
            self.log.add("image_id_repeated", path)
            return None
        self.by_id[number] = self._by_path[path] = image = SourceImage(number, path, size)
        return image

    def images(self) -> list[SourceImage]:
        """Sorted by id, exact repetitions of an annotation dropped."""
        for image in self._by_path.values():
            kept: dict[Annotation, int] = {}
            for n, annotation in enumerate(image.annotations):
                if kept.setdefault(annotation, n) != n:
                    repeated = f"{image.path}: box {list(annotation.box)}"
                    self.log.add("annotation_repeated", repeated)
            image.entries = [image.entries[n] for n in kept.values() if image.entries]
            image.annotations = list(kept)
        return sorted(self._by_path.values(), key=lambda image: image.image_id)


def read_coco_json(path: Path, log: ExtractionLog) -> dict[str, list[dict]]:
    """The lists of ``COCO_RULES`` of a COCO instances json, every entry checked against them.

    Raises:
        DataError: not readable, no json, or an entry without a key or with a useless value of one;
            the message names file, list, entry and key.
    """
    try:
        data = path.read_bytes()
        content, encoding = json.loads(data), json.detect_encoding(data)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no json: {error}") from error
    if encoding != "utf-8":
        log.add("json_encoding", f"{path}: {encoding}")
    for name, rules in COCO_RULES.items():
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise DataError(
                f'{path} has no list "{name}": give a COCO instances json '
                '("images", "annotations", "categories")'
            )
        for n, entry in enumerate(entries):
            where = f'{path}: "{name}" entry {n}'
            if not isinstance(entry, dict):
                raise DataError(f"{where} is {entry!r}, no object")
            for key, types in rules.items():
                if key not in entry:
                    raise DataError(f'{where} lacks "{key}"')
                if not isinstance(entry[key], types):
                    raise DataError(f'{where}: its "{key}" cannot be {repr(entry[key])[:80]}')
    return content


class CocoSource:
    """A COCO-format json and the folder of its images.

    Args:
        json_file: with "images", "annotations", "categories".
        image_root: folder that the json's file names are relative to.
    """

    def __init__(self, json_file: str | Path, image_root: str | Path) -> None:
        self.json_file, self.image_root = Path(json_file), Path(image_root)
        self.name = self.json_file.stem

    def load(self, log: ExtractionLog, entries: bool = False) -> SourceData:
        """Read the json; raises as ``read_coco_json``, and where the image folder is missing.

        ``entries``: keep each annotation as it stands beside what was read of it.
        """
        content = read_coco_json(self.json_file, log)
        if not self.image_root.is_dir():
            raise DataError(f"image folder {self.image_root} does not exist")
        names: dict[int, str] = {}
        for entry in content["categories"]:
            if entry["id"] in names:
                repeated = f"{self.json_file}: category {entry['id']} {entry['name']!r}"
                log.add("category_id_repeated", repeated)
            if not isinstance(entry["name"], str):
                log.add("category_name_not_text", f"{self.json_file}: {entry['name']!r}")
            names.setdefault(entry["id"], str(entry["name"]))
        if not names:
            raise DataError(f'{self.json_file}: "categories" is empty, so there is no class')
        ids = sorted(names)  # as Detectron2 numbers classes
        if ids[-1] - ids[0] + 1 != len(ids):
            log.add("category_ids_with_gaps", f"{len(ids)} ids from {ids[0]} to {ids[-1]}")
        table, said_ids = _ImageTable(log), {}
        for entry in content["images"]:
            path = find_image(self.image_root, entry["file_name"], log)
            if table.add_image(entry["id"], path, self._size(entry, path, log)) is not None:
                said_ids.setdefault(image_number(entry["id"]), entry["id"])
                if entries and isinstance(entry["id"], str):
                    log.add("image_id_is_text", f"{path}: {entry['id']!r}")
        classes, known = {category: n for n, category in enumerate(ids)}, {}
        for n, entry in enumerate(content["annotations"]):
            number, image_id = entry.get("id"), image_number(entry["image_id"])
            where = f"{self.json_file.name}: annotation {n if number is None else number}"
            image, category = table.by_id.get(image_id), entry["category_id"]
            if image is None:
                log.add("annotation_of_unknown_image", where)
                continue
            _compare_kinds(entry["image_id"], said_ids[image_id], "image_id", "images", where, log)
            label = classes.get(category, UNKNOWN_CLASS)
            if isinstance(category, str) and image_number(category) in classes:
                label = classes[image_number(category)]
                _compare_kinds(category, ids[label], "category_id", "categories", where, log)
            x, y, width, height = box_or_nan(entry["bbox"])
            if x == x and any(isinstance(value, str) for value in entry["bbox"]):
                log.add("number_is_text", f"{where}: bbox {entry['bbox']}")
            box = (x, y, x + width, y + height)
            crowd = is_set(entry.get("iscrowd", 0)) or is_set(entry.get("ignore", 0))
            image.annotations.append(Annotation(box, label, crowd))
            image.entries += [entry] if entries else []
            said = (image.path, category, *box)
            if number is not None and known.setdefault(repr(number), said) != said:
                log.add("annotation_id_repeated", where)
        return SourceData(unique_names([names[i] for i in ids], log), ids, table.images())

    @staticmethod
    def _size(entry: dict, path: str, log: ExtractionLog) -> tuple[int, int] | None:
        """(height, width) that the json says; None where it says nothing."""
        said = entry.get("height"), entry.get("width")
        if None in said:
            log.add("image_size_missing", path)
            return None
        height, width, *_ = box_or_nan((*said, 0, 0))
        if any(isinstance(side, str) for side in said) and height == height:
            log.add("number_is_text", f"{path}: height and width {said}")
        return (int(height), int(width)) if (height, width) == (height // 1, width // 1) else said


def _compare_kinds(
    here: object, there: object, key: str, listed: str, where: str, log: ExtractionLog
) -> None:
    """Note an id that is text where the list it refers to has a number, or the reverse."""
    if isinstance(here, str) != isinstance(there, str):
        kinds = ("number", "text") if isinstance(there, str) else ("text", "number")
        said = f"{key} is {here!r} ({kinds[0]}) where the {listed} have {there!r} ({kinds[1]})"
        log.add("id_of_other_kind", f"{where}: {said}")


class RegisteredSource:
    """A dataset registered in Detectron2's ``DatasetCatalog``, by its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def load(self, log: ExtractionLog, entries: bool = False) -> SourceData:
        """Read the dataset's dicts (Detectron2's standard format); ``entries`` as for the other.

        Raises:
            DataError: no such dataset, one without class names, or a dict without a key that the
                format demands.
        """
        from detectron2.data import DatasetCatalog, MetadataCatalog  # imports torch
        from detectron2.structures import BoxMode

        if self.name not in DatasetCatalog.list():
            raise DataError(
                f"no dataset {self.name!r} is registered with Detectron2; register it, or give "
                "--json and --images"
            )
        dicts, metadata = DatasetCatalog.get(self.name), MetadataCatalog.get(self.name)
        names = list(metadata.get("thing_classes", []))
        if not names:
            raise DataError(f"dataset {self.name!r} names no classes: set its thing_classes")
        table, classes = _ImageTable(log), range(len(names))
        try:
            for number, entry in enumerate(dicts):
                size = (entry["height"], entry["width"]) if "height" in entry else None
                file_name = str(entry["file_name"])
                image = table.add_image(entry.get("image_id", number), file_name, size)
                for annotation in entry.get("annotations", []) if image else []:
                    box = [float(v) for v in annotation["bbox"]]
                    box = box_or_nan(
                        BoxMode.convert(box, annotation["bbox_mode"], BoxMode.XYXY_ABS)
                    )
                    category = int(annotation["category_id"])
                    category = category if category in classes else UNKNOWN_CLASS
                    crowd = is_set(annotation.get("iscrowd", 0))
                    image.annotations.append(Annotation(box, category, crowd))
                    image.entries += [annotation] if entries else []
        except KeyError as error:
            key = error.args[0]
            raise DataError(f'dataset {self.name!r}: dict {number} lacks "{key}"') from error
        mapping = metadata.get("thing_dataset_id_to_contiguous_id", {})
        ids = sorted(mapping, key=mapping.get) or list(classes)
        return SourceData(unique_names(names, log), ids, table.images())


def _same(known: object, json_file: str, image_root: str) -> bool:
    """Whether a name stands for the cleaned set that another run made of the same files."""
    path = Path(known.get("json_file") or "")
    are_cleaned = path.parent.name == Path(json_file).parent.name == CLEANED_FOLDER
    is_there = known.get("image_root") == image_root and are_cleaned and path.is_file()
    return is_there and filecmp.cmp(path, json_file, shallow=False)


def register_coco_files(cfg: "CfgNode") -> list[str]:
    """Register each [name, json, image_root] of ``DATASETS.COCO_FILES``; returns the names.

    The same entry again does nothing. Raises ConfigError for an entry of another form or a name
    that already stands for something else, DataError for a file that is missing.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_instances

    for entry in cfg.DATASETS.COCO_FILES:
        if not isinstance(entry, (list, tuple)) or len(entry) != 3:
            raise ConfigError(
                f"DATASETS.COCO_FILES holds {entry!r}; each entry is [name, json, image folder]"
            )
        name, *files = map(str, entry)
        for path, what in zip(files, ("json file", "image folder")):
            if not Path(path).exists():
                raise DataError(f"dataset {name!r}: its {what} {path} does not exist")
        if name not in DatasetCatalog.list():
            register_coco_instances(name, {}, *files)
        known = MetadataCatalog.get(name)
        if [known.get("json_file"), known.get("image_root")] != files and not _same(known, *files):
            raise ConfigError(
                f"dataset name {name!r} already stands for {known.get('json_file')}; choose another"
            )
    return [str(entry[0]) for entry in cfg.DATASETS.COCO_FILES]

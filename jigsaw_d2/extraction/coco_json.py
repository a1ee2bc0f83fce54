"""A COCO instances json -> its images, annotations and categories, of which the keys used here.

msgspec reads the usual file in a fifth of the standard library's time, because it makes no objects
of what is not asked for, the polygons above all. A file that it refuses is read again with the
standard library, which takes more (NaN, encodings other than UTF-8) and lets us name the fault.
"""

import json
from pathlib import Path
from typing import Any

import msgspec

from jigsaw_d2.extraction.log import ExtractionError

Id = int | float | str | None


class CocoImage(msgspec.Struct):
    """An entry of "images"; sizes as they stand there."""

    id: Id
    file_name: str
    height: Any
    width: Any


class CocoAnnotation(msgspec.Struct):
    """An entry of "annotations"; a box as it stands there, right or wrong. ``id`` None: none."""

    image_id: Id
    category_id: Id
    bbox: Any
    iscrowd: Any = 0
    id: Id = None


class CocoCategory(msgspec.Struct):
    """An entry of "categories"."""

    id: int | float
    name: Any


class CocoJson(msgspec.Struct):
    """The whole file."""

    images: list[CocoImage]
    annotations: list[CocoAnnotation]
    categories: list[CocoCategory]


KINDS = {"images": CocoImage, "annotations": CocoAnnotation, "categories": CocoCategory}


def read_coco_json(path: Path) -> CocoJson:
    """The three lists of the file at ``path``.

    Raises:
        ExtractionError: not readable, no json, or an entry without a key or with a useless value
            of one; the message names file, list, entry and key.
    """
    try:
        text = path.read_bytes()
        return msgspec.json.decode(text, type=CocoJson)
    except OSError as error:
        raise ExtractionError(f"{path} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _read_carefully(path, text)


def _read_carefully(path: Path, text: bytes) -> CocoJson:
    """As ``read_coco_json``, with the standard library."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ExtractionError(f"{path} is no json: {error}") from error
    for key in KINDS:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ExtractionError(
                f'{path} has no list "{key}": give a COCO instances json '
                '("images", "annotations", "categories")'
            )
    lists = {
        key: [_check_entry(entry, kind, f'{path}: "{key}" entry {n}') for n, entry in numbered]
        for key, kind in KINDS.items()
        for numbered in [enumerate(content[key])]
    }
    return CocoJson(**lists)


def _check_entry(entry: object, kind: type[msgspec.Struct], where: str) -> msgspec.Struct:
    for field in msgspec.structs.fields(kind):
        if field.required and isinstance(entry, dict) and field.name not in entry:
            raise ExtractionError(f'{where} lacks "{field.name}"')
    try:
        return msgspec.convert(entry, kind)
    except msgspec.ValidationError as error:
        raise ExtractionError(f"{where}: {error}") from error

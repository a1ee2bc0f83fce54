"""A detection set as the detector's training and evaluation see it: that which extraction sees.

Images that cannot be read and annotations that cannot be used are left out, what is missing is
filled in, each counted with its reason; what is left is a COCO json as Detectron2 and pycocotools
expect it.
"""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from jigsaw_d2.data.arrays import ArrayReader
from jigsaw_d2.data.image_reading import probe_image
from jigsaw_d2.data.plan import Probe, check_boxes, check_image
from jigsaw_d2.data.report import FAULT, ExtractionLog
from jigsaw_d2.data.sources import (
    Annotation,
    CocoSource,
    RegisteredSource,
    SourceData,
    SourceImage,
    is_set,
)
from jigsaw_d2.data.workers import start_workers
from jigsaw_d2.io import DataError

# Images that are looked at in one task of a process; fewer than twice as many need no second one.
CHUNK = 1024
# What Detectron2 and pycocotools read as we do, so that a set with nothing else stays as it is.
HARMLESS = frozenset(
    "category_ids_with_gaps box_clipped image_grey image_palette image_cmyk image_alpha "
    "image_rotated image_16_bit_colour image_bands_dropped".split()
)
UNREADABLE = frozenset(
    "image_missing image_unreadable image_empty image_not_an_image image_truncated".split()
)


@dataclass
class CleanSet:
    """What can be used of a set: the images that open, on each its objects and crowds."""

    data: SourceData
    log: ExtractionLog
    _differs: bool = field(default=False, init=False)  # some annotation, from its entry

    @property
    def objects(self) -> int:
        """Annotations that are no crowd."""
        return sum(not a.crowd for image in self.data.images for a in image.annotations)

    @property
    def is_as_it_was(self) -> bool:
        """Whether Detectron2 reads the same from the set's own json; asks after ``to_coco``."""
        return HARMLESS.issuperset(self.log.to_dict()) and not self._differs

    def class_counts(self) -> list[int]:
        """Objects of each class."""
        counts = [0] * len(self.data.categories)
        for image in self.data.images:
            for annotation in image.annotations:
                counts[annotation.class_index] += not annotation.crowd
        return counts

    def to_coco(self) -> dict:
        """Content of a COCO instances json; what was filled in is counted.

        Annotation ids are unique and above 0: pycocotools takes a detection that matched the object
        of id 0 for one that matched nothing.
        """
        rows = [(i, *row) for i in self.data.images for row in zip(i.annotations, i.entries)]
        ids = [entry.get("id") for *_, entry in rows]
        for number, (image, *_) in zip(ids, rows):
            if type(number) is not int or number < 1:
                self.log.add("annotation_id_unusable", f"{image.path}: id {number!r}")
        if len(set(map(repr, ids))) < len(ids) or self.log.counts["annotation_id_unusable"]:
            ids = list(range(1, len(ids) + 1))
        names = zip(self.data.category_ids, self.data.categories)
        return {
            "images": [
                {
                    "id": image.image_id,
                    "file_name": os.path.abspath(image.path),
                    "height": image.size[0],
                    "width": image.size[1],
                }
                for image in self.data.images
            ],
            "annotations": [self._annotation(n, *row) for n, row in zip(ids, rows)],
            "categories": [{"id": number, "name": name} for number, name in names],
        }

    def _annotation(
        self, number: int, image: SourceImage, annotation: Annotation, entry: dict
    ) -> dict:
        where = f"{image.path}: annotation {number}"
        box = [float(value) for value in entry["bbox"]]
        texts = [isinstance(entry.get(key), str) for key in ("area", "iscrowd")]
        if any(texts) and not any(isinstance(value, str) for value in entry["bbox"]):
            self.log.add("number_is_text", where)
        if "iscrowd" not in entry:
            self.log.add("annotation_iscrowd_missing", where)
        try:
            area = float(entry.get("area"))
        except (TypeError, ValueError):
            area = math.nan
        if not math.isfinite(area):
            self.log.add("annotation_area_missing", where)
            area = box[2] * box[3]
        made = {
            "id": number,
            "image_id": image.image_id,
            "category_id": self.data.category_ids[annotation.class_index],
            "bbox": box,
            "area": area,
            "iscrowd": int(annotation.crowd),
        }
        self._differs |= any(entry.get(key) != value for key, value in made.items())
        if is_set(entry.get("ignore", 0)):
            self.log.add("annotation_ignored", where)
        if outline := entry.get("segmentation"):
            kept = usable_segmentation(outline, image.size)
            if kept != outline:
                self.log.add("segmentation_unusable", where)
            made |= {"segmentation": kept} if kept else {}
        extra = ("keypoints", "num_keypoints")
        return made | {key: entry[key] for key in extra if key in entry}


def usable_segmentation(outline: object, size: tuple[int, int]) -> object:
    """The polygons of at least three corners, or the mask if it is of ``size``; else None."""
    if isinstance(outline, dict):
        counts = outline.get("counts")
        good = isinstance(counts, (str, list)) and list(outline.get("size", [])) == list(size)
        return outline if good else None
    polygons = outline if isinstance(outline, list) else []
    return [p for p in polygons if _is_polygon(p)] or None


def _is_polygon(points: object) -> bool:
    if not isinstance(points, list) or len(points) < 6 or len(points) % 2:
        return False
    return all(isinstance(v, (int, float)) and math.isfinite(v) for v in points)


def clean_set(
    source: CocoSource | RegisteredSource,
    log: ExtractionLog | None = None,
    reader: ArrayReader | None = None,
) -> CleanSet:
    """Read a set and look at each of its images, which ``reader`` reads if they are no pictures.

    Raises:
        DataError: as ``source.load``; if ``log`` is strict, at the first fault.
    """
    log = log or ExtractionLog()
    data, images = source.load(log, entries=True), []
    chunks = [data.images[n : n + CHUNK] for n in range(0, len(data.images), CHUNK)]
    bare = ([replace(i, annotations=[], entries=[]) for i in chunk] for chunk in chunks)
    with start_workers(None if len(chunks) > 2 else 0) as run:
        probe = reader.probe if reader else probe_image
        found = run(_sizes, ((chunk, log.strict, probe) for chunk in bare))
        for chunk, (sizes, chunk_log) in zip(chunks, found):
            log.merge(chunk_log)
            images += _clean_images(chunk, sizes, log)
    return CleanSet(replace(data, images=images), log)


def _sizes(
    images: list[SourceImage], strict: bool, probe: Probe
) -> tuple[list[tuple[int, int] | None], dict]:
    log = ExtractionLog(strict)
    return [check_image(image, log, probe) for image in images], log.to_dict()


def _clean_images(
    images: Iterable[SourceImage], sizes: Iterable[tuple[int, int] | None], log: ExtractionLog
) -> Iterable[SourceImage]:
    for image, size in zip(images, sizes):
        if size is not None:
            usable, _ = check_boxes(image, size, 0.0, log, crowds=True)
            annotations, entries = (
                [value for value, good in zip(values, usable) if good]
                for values in (image.annotations, image.entries)
            )
            yield replace(image, size=size, annotations=annotations, entries=entries)


def check_same_classes(classes: Mapping[str, list[str]]) -> None:
    """Raise DataError for sets, {name: class names}, of other classes or another order of them."""
    first = next(iter(classes), None)
    other = next((name for name in classes if classes[name] != classes[first]), None)
    if other is not None:
        pair = (first, other)
        listed = [f"{n} {len(classes[n])} ({', '.join(classes[n][:5])})" for n in pair]
        raise DataError(
            f"datasets of different classes: {', '.join(listed)}: the same names in the same "
            "order of their ids are needed"
        )


def check_objects(name: str, clean: CleanSet, held_out: bool) -> None:
    """Raise DataError for a set without any object, and for a held-out set with unreadable images.

    A score over the images that are left would be compared with scores over all of them.
    """
    if clean.objects:
        lost = [(r, n) for r, n in clean.log.counts.items() if n and r in UNREADABLE]
        if held_out and lost:
            raise DataError(
                f"dataset {name!r} has images that cannot be read, on which nothing would be "
                f"scored ({', '.join(f'{n} x {r}' for r, n in lost)}, for example "
                f"{clean.log.examples[lost[0][0]][0]}): mend them, or take them out of its json"
            )
        return
    why = "there is nothing to learn from"
    if held_out:
        why = "nothing can be evaluated: give a held-out set with objects, or none"
    counted = clean.log.summary(FAULT)
    raise DataError(
        f"dataset {name!r} has no usable object, so {why}{'; ' * bool(counted)}{counted}"
    )


def describe(name: str | Path, clean: CleanSet) -> str:
    """What will be used of a set, and what was skipped and noticed; for the screen."""
    counts = clean.class_counts()
    empty = [name for name, count in zip(clean.data.categories, counts) if not count]
    lines = [
        f"{name}: {len(clean.data.images)} images, {clean.objects} objects of "
        f"{len(counts)} classes"
        + (f"; without any object: {', '.join(empty[:10])}" if empty else "")
        + (f" and {len(empty) - 10} more" if len(empty) > 10 else "")
    ]
    return "\n\n".join(lines + clean.log.tables())

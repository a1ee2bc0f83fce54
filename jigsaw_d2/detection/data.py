"""The detector's data: cleaned, registered, and checked before anything is trained."""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from jigsaw_d2.data.arrays import make_reader
from jigsaw_d2.data.cleaning import (
    CleanSet,
    check_objects,
    check_same_classes,
    clean_set,
    describe,
    usable_segmentation,
)
from jigsaw_d2.data.report import FAULT
from jigsaw_d2.data.sources import CLEANED_FOLDER, CocoSource, RegisteredSource, register_coco_files
from jigsaw_d2.io import ConfigError, DataError, write_text

logger = logging.getLogger(__name__)

# What stops the training of a set that a module registered, and that is taken as it is.
FATAL = ("image_", "annotation_of_unknown_category")


def prepare_data(cfg: CfgNode) -> list[str]:
    """Clean, check and register the sets of ``cfg.DATASETS``; the class names.

    A set of DATASETS.COCO_FILES that Detectron2 would not read as the extraction does is replaced,
    in ``cfg`` too, by its cleaned json in OUTPUT_DIR/datasets.

    Raises:
        DataError: a set that is unknown, unreadable or without objects; sets of different classes.
        ConfigError: an entry that is no [name, json, image folder].
    """
    cleaned = clean_sets(cfg)
    check_sets(cfg, cleaned)
    entries = []
    for name, json_file, root in cfg.DATASETS.COCO_FILES:
        if name in cleaned:
            json_file = _write_cleaned(Path(cfg.OUTPUT_DIR), name, json_file, cleaned[name])
        entries.append([name, json_file, root])
    cfg.DATASETS.COCO_FILES = entries
    register_coco_files(cfg)
    for name, clean in cleaned.items():
        MetadataCatalog.get(name).thing_classes = clean.data.categories
    return dataset_classes(cfg)


def _write_cleaned(folder: Path, name: str, json_file: str, clean: CleanSet) -> str:
    """Path of the json to train from; the digest in a new one's name keeps that of another run."""
    content = json.dumps(clean.to_coco())
    said = describe(f"{name} ({json_file})", clean)
    if clean.is_as_it_was:
        logger.info("%s", said)
        return json_file
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    path = (folder / CLEANED_FOLDER / f"{Path(name).name}-{digest}.json").resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, content)
    logger.warning("%s\n\ntraining and evaluation read what is left from %s", said, path)
    return str(path)


def clean_sets(cfg: CfgNode) -> dict[str, CleanSet]:
    """{name: what can be used} of the sets of DATASETS.COCO_FILES that ``cfg`` trains or tests on.

    Raises:
        DataError: a set that cannot be read.
        ConfigError: an entry that is no [name, json, image folder].
    """
    cleaned = {}
    for entry in cfg.DATASETS.COCO_FILES:
        if not isinstance(entry, (list, tuple)) or len(entry) != 3:
            raise ConfigError(
                f"DATASETS.COCO_FILES holds {entry!r}; each entry is [name, json, image folder]"
            )
        name, *files = map(str, entry)
        if name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
            try:
                cleaned[name] = clean_set(CocoSource(*files), reader=make_reader(cfg))
            except DataError as error:
                raise DataError(f"dataset {name!r} cannot be read: {error}") from None
    return cleaned


def check_sets(cfg: CfgNode, cleaned: Mapping[str, CleanSet]) -> None:
    """Whether the sets serve: the same classes, objects in each, masks where masks are trained.

    Sets INPUT.MASK_FORMAT where masks are run-length encoded.

    Raises:
        DataError: naming the set, and what to do.
    """
    names = [n for n in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST) if n in cleaned]
    check_same_classes({name: cleaned[name].data.categories for name in names})
    for name in names:
        check_objects(name, cleaned[name], held_out=name not in cfg.DATASETS.TRAIN)
        if cfg.MODEL.MASK_ON:
            _check_masks(cfg, name, cleaned[name])


def _check_masks(cfg: CfgNode, name: str, clean: CleanSet) -> None:
    is_test, outlines = name in cfg.DATASETS.TEST, []
    for image in clean.data.images:
        for annotation, entry in zip(image.annotations, image.entries):
            if is_test or not annotation.crowd:
                outlines.append(usable_segmentation(entry.get("segmentation"), image.size))
    without = outlines.count(None)
    if without:
        raise DataError(
            f"dataset {name!r} has no segmentation for {without} of {len(outlines)} objects, but "
            "the config trains masks: choose a config without masks (MODEL.MASK_ON False trains "
            "boxes), or annotations with them"
        )
    if cfg.INPUT.MASK_FORMAT == "polygon" and any(isinstance(o, dict) for o in outlines):
        logger.warning("dataset %r has masks as RLE: INPUT.MASK_FORMAT polygon -> bitmask", name)
        cfg.INPUT.MASK_FORMAT = "bitmask"


def check_registered(cfg: CfgNode) -> None:
    """The same for sets that a module registered, which are trained on as Detectron2 reads them.

    Raises:
        DataError: as ``check_sets``; what would stop the training in a worker.
    """
    listed = {entry[0] for entry in cfg.DATASETS.COCO_FILES}
    names = {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST} - listed
    cleaned = {
        name: clean_set(RegisteredSource(name), reader=make_reader(cfg)) for name in sorted(names)
    }
    for name, clean in cleaned.items():
        logger.info("%s", describe(name, clean))
        found = clean.log.to_dict()
        fatal = [r for r in found if r.startswith(FATAL) and found[r]["kind"] == FAULT]
        if fatal:
            raise DataError(
                f"dataset {name!r}, which a module registered: {clean.log.summary(FAULT)}. List "
                "its json in DATASETS.COCO_FILES, where such things are left out, or mend it"
            )
    before = cfg.INPUT.MASK_FORMAT
    check_sets(cfg, cleaned)
    if cfg.INPUT.MASK_FORMAT != before:
        raise DataError("masks are run-length encoded: set INPUT.MASK_FORMAT bitmask")


def dataset_classes(cfg: CfgNode) -> list[str]:
    """Class names of ``cfg.DATASETS.TRAIN``, after registering ``DATASETS.COCO_FILES``.

    Raises:
        DataError: a set that is unknown or unreadable, or sets of different classes.
    """
    register_coco_files(cfg)
    if not cfg.DATASETS.TRAIN:
        raise DataError("DATASETS.TRAIN is empty: name at least one set to train on")
    classes = {name: _classes(name) for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)}
    check_same_classes(classes)
    return classes[cfg.DATASETS.TRAIN[0]]


def _classes(name: str) -> list[str]:
    if name not in DatasetCatalog.list():
        raise DataError(
            f"dataset {name!r} is not registered: list it in DATASETS.COCO_FILES as "
            f'["{name}", "annotations.json", "image folder"], name one that Detectron2 knows, or '
            "--register the module that registers it"
        )
    if not MetadataCatalog.get(name).get("thing_classes"):
        try:
            DatasetCatalog.get(name)  # Detectron2 learns the classes while it reads the json
        except (OSError, ValueError, KeyError, AssertionError) as error:
            raise DataError(f"dataset {name!r} cannot be read: {error}") from None
    classes = MetadataCatalog.get(name).get("thing_classes")
    if not classes:
        raise DataError(f"dataset {name!r} has no classes (thing_classes)")
    return list(classes)

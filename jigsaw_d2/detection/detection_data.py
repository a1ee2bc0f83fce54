"""The detection sets that a fine-tuning reads: their classes, and whether they serve its config."""

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from jigsaw_d2.data.sources import register_coco_files
from jigsaw_d2.io import DataError as DatasetError


def dataset_classes(cfg: CfgNode) -> list[str]:
    """Class names of ``cfg.DATASETS.TRAIN``, after registering ``DATASETS.COCO_FILES``.

    Raises:
        DatasetError: a set that is unknown or unreadable, or sets of different classes.
    """
    register_coco_files(cfg)
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    if not cfg.DATASETS.TRAIN:
        raise DatasetError("DATASETS.TRAIN is empty: name at least one set to train on")
    classes = {name: _classes(name) for name in names}
    first = classes[names[0]]
    for name, other in classes.items():
        if other != first:
            raise DatasetError(
                f"datasets of different classes: {names[0]} {_short(first)}, {name} {_short(other)}"
            )
    return first


def check_annotations(cfg: CfgNode) -> None:
    """Whether the training set has what the detector is to learn.

    Raises:
        DatasetError: masks are wanted and none are annotated.
    """
    if not cfg.MODEL.MASK_ON:
        return
    for name in cfg.DATASETS.TRAIN:
        annotations = (a for record in DatasetCatalog.get(name) for a in record["annotations"])
        if not any(annotation.get("segmentation") for annotation in annotations):
            raise DatasetError(
                f"dataset {name!r} has no segmentation, but the config trains masks: choose a "
                "config without masks (MODEL.MASK_ON False), or annotations with them"
            )


def _classes(name: str) -> list[str]:
    if name not in DatasetCatalog.list():
        raise DatasetError(
            f"dataset {name!r} is not registered: list it in DATASETS.COCO_FILES as "
            f'["{name}", "annotations.json", "image folder"], or name one that Detectron2 knows'
        )
    metadata = MetadataCatalog.get(name)
    if not metadata.get("thing_classes"):
        try:
            DatasetCatalog.get(name)  # Detectron2 learns the classes while it reads the json
        except (OSError, ValueError, KeyError) as error:
            raise DatasetError(f"dataset {name!r} cannot be read: {error}") from None
    classes = MetadataCatalog.get(name).get("thing_classes")
    if not classes:
        raise DatasetError(f"dataset {name!r} has no classes (thing_classes)")
    return list(classes)


def _short(classes: Sequence[str]) -> str:
    return f"{len(classes)} ({', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''})"

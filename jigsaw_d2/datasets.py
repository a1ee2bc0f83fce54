"""COCO-format datasets by configuration alone: ``DATASETS.COCO_FILES`` -> Detectron2's catalogs."""

import logging
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from jigsaw_d2.errors import JigsawError

logger = logging.getLogger(__name__)


class DatasetError(JigsawError, ValueError):
    """A dataset entry that cannot be registered."""


def register_coco_files(cfg: CfgNode) -> list[str]:
    """Register each [name, json, image_root] of ``DATASETS.COCO_FILES``; returns the names.

    Registering the same entry again does nothing.

    Raises:
        DatasetError: an entry of another form, a file that is missing, or a name that already
            stands for something else.
    """
    names = []
    for entry in cfg.DATASETS.COCO_FILES:
        if not isinstance(entry, (list, tuple)) or len(entry) != 3:
            raise DatasetError(
                f"DATASETS.COCO_FILES holds {entry!r}; each entry is [name, json, image folder]"
            )
        register_coco_file(*(str(part) for part in entry))
        names.append(str(entry[0]))
    return names


def register_coco_file(name: str, json_file: str, image_root: str) -> None:
    """Register one COCO-format dataset under ``name``; the same one twice is no error.

    Raises:
        DatasetError: as ``register_coco_files``.
    """
    for path, what in ((json_file, "json file"), (image_root, "image folder")):
        if not Path(path).exists():
            raise DatasetError(f"dataset {name!r}: its {what} {path} does not exist")
    if name not in DatasetCatalog.list():
        register_coco_instances(name, {}, json_file, image_root)
        return
    known = MetadataCatalog.get(name)
    same = (known.get("json_file"), known.get("image_root")) == (json_file, image_root)
    if not same:
        raise DatasetError(
            f"dataset name {name!r} already stands for {known.get('json_file')}; choose another"
        )
    logger.debug("dataset %s is registered already", name)

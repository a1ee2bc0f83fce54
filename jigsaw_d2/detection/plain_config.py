"""A config for Detectron2's own ``tools/train_net.py``: same job, none of our keys or code."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog

from jigsaw_d2.checkpoint import read_converted
from jigsaw_d2.detection.detection_config import config_changes, load_detection_config
from jigsaw_d2.detection.finetune_config import NUM_CLASSES_KEYS, apply_classes, apply_passport
from jigsaw_d2.weights.weight_files import write_text


def plain_config(
    config_file: str,
    weights: str | Path,
    overrides: Sequence[str] = (),
    *,
    match_architecture: bool = False,
) -> CfgNode:
    """The config that fine-tunes ``weights``, without reading a dataset.

    Classes are those of ``cfg.DATASETS.TRAIN`` if Detectron2 knows them, else those that the
    weights were pre-trained on, else the config's own.

    Raises:
        JigsawError: see ``finetune_config.setup_finetune``.
    """
    cfg = load_detection_config(config_file, overrides)
    passport = read_converted(weights)[1]
    explicit = frozenset(overrides[::2])
    apply_passport(cfg, passport, explicit=explicit, match_architecture=match_architecture)
    cfg.MODEL.WEIGHTS = str(Path(weights).resolve())
    classes = _known_classes(cfg) or passport.categories
    if classes and not explicit & set(NUM_CLASSES_KEYS):
        apply_classes(cfg, classes, explicit)
    return cfg


def write_plain_config(path: str | Path, cfg: CfgNode, force: bool = False) -> None:
    """Write what differs from Detectron2's defaults, in Detectron2's keys alone.

    Raises:
        WeightFileError: ``path`` exists and ``force`` is False.
    """
    changes = only_known(config_changes(get_cfg(), cfg), get_cfg())
    text = yaml.safe_dump(changes | {"VERSION": 2}, sort_keys=True, default_flow_style=None)
    head = (
        "# For Detectron2's own tools/train_net.py --config-file THIS; written with the weights it "
        "names.\n# Register the datasets it names first, unless Detectron2 knows them.\n"
    )
    write_text(path, head + text, force)


def only_known(values: Mapping[str, Any], known: CfgNode) -> dict[str, Any]:
    """``values`` without the keys that ``known`` lacks, at any depth; empty nodes are left out."""
    kept: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            continue
        if isinstance(known[key], CfgNode):
            value = only_known(value, known[key])
            if not value:
                continue
        kept[key] = value
    return kept


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"A.B": 1} -> {"A": {"B": 1}}."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *nodes, last = key.split(".")
        node = nested
        for part in nodes:
            node = node.setdefault(part, {})
        node[last] = value
    return nested


def _known_classes(cfg: CfgNode) -> Sequence[str]:
    if not cfg.DATASETS.TRAIN:
        return ()
    return MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes") or ()

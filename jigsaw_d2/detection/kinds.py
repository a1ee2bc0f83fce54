"""What each kind of detector needs of its sets, asked before any training; its evaluators."""

import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path

from detectron2 import evaluation
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators

from jigsaw_d2.io import ConfigError, DataError

logger = logging.getLogger(__name__)

# COCO's person; of other keypoints nobody has measured how far annotators differ.
_COCO_KEYPOINTS, _SIGMA = 17, 0.05
# What Detectron2's evaluators import when they are made.
_PACKAGES = {
    "lvis": "lvis",
    "coco_panoptic_seg": "panopticapi",
    "cityscapes_instance": "cityscapesscripts",
    "cityscapes_sem_seg": "cityscapesscripts",
}
_STUFF = ("SemanticSegmentor", "PanopticFPN", "PanopticDeepLab")


def fit_kind(cfg: CfgNode) -> None:
    """Check that the sets have what the config trains and is scored by; set what follows, in place.

    Raises:
        DataError: naming the set and what it lacks.
        ConfigError: files of proposals that are not there.
    """
    listed = [e for e in cfg.DATASETS.COCO_FILES if isinstance(e, (list, tuple)) and len(e) == 3]
    files = {str(name): str(json_file) for name, json_file, _ in listed}
    _check_proposals(cfg)
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        if cfg.MODEL.META_ARCHITECTURE in _STUFF:
            _check_stuff(cfg, name, name in files)
        if cfg.MODEL.KEYPOINT_ON and name in files:
            _fit_keypoints(cfg, name, files[name])
    for name in cfg.DATASETS.TEST:
        kind = _kind_of(name)
        package = _PACKAGES.get(kind, "json")
        if importlib.util.find_spec(package) is None:
            raise DataError(
                f"dataset {name!r} is scored by {package} (its evaluator_type is {kind}), which "
                f"is not installed: pip install {package}, or leave it out of DATASETS.TEST"
            )


def _kind_of(name: str) -> str:
    return MetadataCatalog.get(name).get("evaluator_type", "coco")


def _check_proposals(cfg: CfgNode) -> None:
    if not cfg.MODEL.LOAD_PROPOSALS:
        return
    for split in ("TRAIN", "TEST"):
        sets, files = cfg.DATASETS[split], cfg.DATASETS[f"PROPOSAL_FILES_{split}"]
        missing = [f for f in files if "://" not in f and not Path(f).is_file()]
        if len(sets) != len(files) or missing:
            raise ConfigError(
                f"the config takes proposals from files: DATASETS.PROPOSAL_FILES_{split} names "
                f"{len(files)} for the {len(sets)} sets of DATASETS.{split}"
                + (f", and there is no {', '.join(missing)}" if missing else "")
                + "; name one for each, or choose a Faster R-CNN config, which makes its own"
            )


def _check_stuff(cfg: CfgNode, name: str, is_json: bool) -> None:
    try:
        first = {} if is_json else next(iter(DatasetCatalog.get(name)), {})
    except (KeyError, OSError):
        return  # what reads the set says what is wrong with it
    if "sem_seg_file_name" not in first:
        raise DataError(
            f"dataset {name!r} has no semantic masks (sem_seg_file_name of its records), which "
            f"{cfg.MODEL.META_ARCHITECTURE} learns from: register it by detectron2.data.datasets."
            "register_coco_panoptic_separated in a module of --register, or choose a config of "
            "boxes or instance masks"
        )


def _fit_keypoints(cfg: CfgNode, name: str, json_file: str) -> None:
    try:
        content = json.loads(Path(json_file).read_bytes())
        counts = {len(a.get("keypoints") or ()) // 3 for a in content["annotations"]}
        named = [c["keypoints"] for c in content["categories"] if c.get("keypoints")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # what reads the set says what is wrong with it
    counts.discard(0)
    names = list(cfg.DATASETS.KEYPOINTS) or (list(map(str, named[0])) if named else [])
    if len(counts) != 1 or len(names) != max(counts):
        found = ", ".join(map(str, sorted(counts))) or "no"
        raise DataError(
            f"dataset {name!r}: the config trains keypoints, of which its annotations have {found} "
            f"and its categories name {len(names)} (DATASETS.KEYPOINTS names them instead): choose "
            "a config without keypoints, or annotations with one list of them"
        )
    cfg.DATASETS.KEYPOINTS = names
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = len(names)
    if len(names) != _COCO_KEYPOINTS and len(cfg.TEST.KEYPOINT_OKS_SIGMAS) != len(names):
        logger.warning("TEST.KEYPOINT_OKS_SIGMAS: %g for each of %d keypoints", _SIGMA, len(names))
        cfg.TEST.KEYPOINT_OKS_SIGMAS = [_SIGMA] * len(names)


def register_keypoints(cfg: CfgNode) -> None:
    """Tell Detectron2 the names of DATASETS.KEYPOINTS, and which change places in a mirror."""
    names = list(cfg.DATASETS.KEYPOINTS)
    mirrored = [(n, n.replace("left", "right")) for n in names if "left" in n]
    for name, *_ in cfg.DATASETS.COCO_FILES if names else ():
        metadata = MetadataCatalog.get(str(name))
        metadata.keypoint_names = names
        metadata.keypoint_flip_map = [pair for pair in mirrored if pair[1] in names]


def build_evaluators(
    cfg: CfgNode, name: str, output: str, coco: Callable[..., DatasetEvaluator]
) -> DatasetEvaluator:
    """The evaluators of a set's kind, as Detectron2's own train_net.py chooses them.

    ``coco``: makes the one for boxes, instance masks and keypoints.

    Raises:
        DataError: a kind that is none of Detectron2's.
    """
    kind, found = _kind_of(name), []
    if kind in ("sem_seg", "coco_panoptic_seg"):
        found.append(evaluation.SemSegEvaluator(name, distributed=True, output_dir=output))
    if kind in ("coco", "coco_panoptic_seg"):
        sigmas = tuple(cfg.TEST.KEYPOINT_OKS_SIGMAS)
        found.append(coco(name, output_dir=output, kpt_oks_sigmas=sigmas))
    if kind == "coco_panoptic_seg":
        found.append(evaluation.COCOPanopticEvaluator(name, output))
    if kind == "lvis":
        found.append(evaluation.LVISEvaluator(name, output_dir=output))
    others = {
        "pascal_voc": evaluation.PascalVOCDetectionEvaluator,
        "cityscapes_instance": evaluation.CityscapesInstanceEvaluator,
        "cityscapes_sem_seg": evaluation.CityscapesSemSegEvaluator,
    }
    if kind in others:
        found.append(others[kind](name))
    if not found:
        raise DataError(f"dataset {name!r}: Detectron2 has no evaluator of its type {kind!r}")
    return found[0] if len(found) == 1 else DatasetEvaluators(found)

"""A detection config made fit for given weights: what the passport demands, never a guess.

A config file is a start, which the passport changes; a KEY VALUE override is the user's will, which
is refused where it contradicts the passport.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode

from jigsaw_d2.checkpoint import read_converted
from jigsaw_d2.detection.detection_config import get_key, load_detection_config, set_key
from jigsaw_d2.detection.detection_data import dataset_classes
from jigsaw_d2.errors import JigsawError
from jigsaw_d2.weights.architecture import BATCH_NORMS, Architecture, norm_family
from jigsaw_d2.weights.passport import Passport

logger = logging.getLogger(__name__)

SCRATCH = "none"
NUM_CLASSES_KEYS = ("MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.RETINANET.NUM_CLASSES")
_NORM_KEYS = tuple(
    f"MODEL.{part}.NORM"
    for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "RETINANET")
)
# Random weights: the paper's input, a norm that trains (Table 5: group norm) and nothing frozen.
SCRATCH_PASSPORT = Passport(
    origin="scratch",
    architecture=Architecture(),
    input_format="RGB",
    pixel_mean=(123.675, 116.28, 103.53),
    pixel_std=(58.395, 57.12, 57.375),
)
SCRATCH_DEMANDS = {
    "MODEL.RESNETS.NORM": "GN",
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.BACKBONE.FREEZE_AT": 0,
}


class FinetuneConfigError(JigsawError, ValueError):
    """A detection config that does not fit the weights, the data, or itself."""


def read_passport(weights: str | Path) -> Passport:
    """Passport of a converted file; "none" (or "") is training from scratch."""
    if str(weights) in ("", SCRATCH):
        return SCRATCH_PASSPORT
    return read_converted(weights)[1]


def setup_finetune(
    config_file: str,
    weights: str | Path,
    overrides: Sequence[str] = (),
    *,
    match_architecture: bool = False,
    force: bool = False,
) -> CfgNode:
    """The config with which ``weights`` can be fine-tuned on ``cfg.DATASETS``.

    Args:
        weights: a converted file, or "none" to start from random weights.
        overrides: flat list [key, value, ...] as from the command line.
        match_architecture: take depth, groups, widths and deformable stages from the passport
            instead of refusing a config of another network.
        force: where an override contradicts the passport, let the override win.

    Raises:
        FinetuneConfigError: contradictions, each with both values.
        JigsawError: weights or datasets that cannot be read.
    """
    cfg = load_detection_config(config_file, overrides)
    if "MODEL.WEIGHTS" in overrides[::2]:
        raise FinetuneConfigError(
            "MODEL.WEIGHTS is set by --weights; leave it out of the overrides"
        )
    passport = read_passport(weights)
    explicit = frozenset(overrides[::2])
    apply_passport(
        cfg, passport, explicit=explicit, match_architecture=match_architecture, force=force
    )
    cfg.MODEL.WEIGHTS = "" if passport.origin == "scratch" else str(Path(weights).resolve())
    apply_classes(cfg, dataset_classes(cfg), explicit)
    fit_machine(cfg)
    return cfg


def apply_passport(
    cfg: CfgNode,
    passport: Passport,
    *,
    explicit: frozenset[str] = frozenset(),
    match_architecture: bool = False,
    force: bool = False,
) -> None:
    """Set, in place, what ``passport`` demands; ``explicit`` keys are the user's and stay.

    Raises:
        FinetuneConfigError: listing each key with both values.
    """
    wanted = cfg.MODEL.JIGSAW.ORIGIN
    if wanted and wanted != passport.origin:
        raise FinetuneConfigError(
            f"MODEL.JIGSAW.ORIGIN is {wanted!r}, but the weights are {passport.origin!r}: this "
            "config is a row of the paper's tables that starts from other weights"
        )
    needed = passport.architecture.config_keys()
    demands = passport.demands()
    if passport.origin == "scratch":
        demands |= {k: v for k, v in SCRATCH_DEMANDS.items() if not _trains(cfg, k, explicit)}
    if cfg.MODEL.JIGSAW.NEW_OFFSETS and not any(passport.architecture.deform_on_per_stage or ()):
        needed.pop("MODEL.RESNETS.DEFORM_ON_PER_STAGE", None)
        # modulated: the zero offsets come with masks of sigmoid(0) = 1/2, no plain convolution
        needed["MODEL.RESNETS.DEFORM_MODULATED"] = False
    conflicts = []
    for key, value in (needed | demands).items():
        if fits(key, get_key(cfg, key), value):
            continue
        if (key in demands or match_architecture) and key not in explicit:
            set_key(cfg, key, value)
        else:
            conflicts.append(f"{key}: config {get_key(cfg, key)}, weights {value}")
    if conflicts and not force:
        raise FinetuneConfigError(
            f"config and passport contradict each other: {'; '.join(conflicts)} (--force insists "
            "on the config; --match-architecture takes the network from the weights, where no "
            "override names it)"
        )
    for conflict in conflicts:
        logger.warning("insisted on against the passport: %s", conflict)


def apply_classes(cfg: CfgNode, classes: Sequence[str], explicit: frozenset[str]) -> None:
    """Set the number of classes of every kind of head from the dataset's class names.

    Raises:
        FinetuneConfigError: an override gives another number.
    """
    for key in NUM_CLASSES_KEYS:
        if key in explicit and get_key(cfg, key) != len(classes):
            raise FinetuneConfigError(
                f"{key}: config {get_key(cfg, key)}, dataset {cfg.DATASETS.TRAIN} has "
                f"{len(classes)}: {', '.join(classes)}"
            )
        set_key(cfg, key, len(classes))


def fit_machine(cfg: CfgNode) -> None:
    """On a machine without GPU: the CPU, no synchronised norm, no mixed precision; logged."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("no GPU here: MODEL.DEVICE cuda -> cpu")
        cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.DEVICE != "cpu":
        return
    for key in _NORM_KEYS:
        if "Sync" in get_key(cfg, key):
            logger.warning("on a CPU: %s %s -> BN", key, get_key(cfg, key))
            set_key(cfg, key, "BN")
    if cfg.SOLVER.AMP.ENABLED:
        logger.warning("on a CPU, where Detectron2 has none: SOLVER.AMP.ENABLED True -> False")
        cfg.SOLVER.AMP.ENABLED = False


def fits(key: str, have: Any, need: Any) -> bool:
    """Whether value ``have`` of a config serves weights that need ``need``."""
    if key == "MODEL.RESNETS.NORM":
        return norm_family(have) == norm_family(need) and (have in BATCH_NORMS or have == need)
    if isinstance(need, (list, tuple)) and isinstance(have, (list, tuple)):
        # 1e-3 of a 0..255 pixel: as 123.675 against 0.485 * 255 printed shorter
        return len(have) == len(need) and all(abs(a - b) <= 1e-3 for a, b in zip(have, need))
    return have == need


def _trains(cfg: CfgNode, key: str, explicit: frozenset[str]) -> bool:
    """Whether random weights train with the config's own value of a key of ``SCRATCH_DEMANDS``."""
    if key == "MODEL.RESNETS.NORM":
        return cfg.MODEL.RESNETS.NORM not in ("FrozenBN", "")
    return key == "MODEL.RESNETS.STRIDE_IN_1X1" and key in explicit

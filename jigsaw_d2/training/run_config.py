"""A configuration as one run on this machine uses it: all "auto", 0 or scaled made definite."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.utils import comm

from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.errors import JigsawError
from jigsaw_d2.training.checkpointing import read_checkpoint
from jigsaw_d2.training.lr_schedule import scale_to_batch
from jigsaw_d2.training.norm import check_trainable_config, resolve_norm

logger = logging.getLogger(__name__)

# Keys that may change between a checkpoint and its resume without changing any loss.
_FREE_KEYS = (
    "OUTPUT_DIR",
    "MODEL.WEIGHTS",
    "DATALOADER.NUM_WORKERS",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.PEER_TIMEOUT",
    "TEST.",
    "DATASETS.",
    "INPUT.JIGSAW.EVAL_",
    "MODEL.JIGSAW.ERF.FIGURES",
)


class RunConfigError(JigsawError, ValueError):
    """Settings that do not fit each other, the machine or the data."""


def resolve_config(cfg: CfgNode, store: SampleStore, world_size: int = 1) -> CfgNode:
    """The frozen config of a run; resolving it again changes nothing.

    1. Batch: IMS_PER_BATCH divides over ranks and ACCUMULATION_STEPS; rate and lengths scaled once.
    2. Machine: MODEL.DEVICE exists; the norm of "auto" is chosen.
    3. Data: NUM_CLASSES is the store's; a SEED below 0 becomes the one that OUTPUT_DIR's run
       drew, or a new one.
    4. Nothing is frozen, and the classified feature is built.

    Raises:
        RunConfigError, ScheduleError, FrozenError: naming the key.
    """
    cfg = scale_to_batch(cfg)
    cfg.defrost()
    _check_batch(cfg, world_size)
    check_device(cfg)
    cfg.MODEL.RESNETS.NORM = resolve_norm(cfg, world_size)
    classes = len(store.categories)
    if cfg.MODEL.JIGSAW.NUM_CLASSES not in (0, classes):
        raise RunConfigError(
            f"MODEL.JIGSAW.NUM_CLASSES is {cfg.MODEL.JIGSAW.NUM_CLASSES}, but the store "
            f"{', '.join(cfg.DATASETS.TRAIN)} has {classes} categories; set that or 0"
        )
    cfg.MODEL.JIGSAW.NUM_CLASSES = classes
    if cfg.SEED < 0:
        cfg.SEED = _draw_seed(Path(cfg.OUTPUT_DIR))
    check_trainable_config(cfg)
    cfg.freeze()
    return cfg


def open_store(cfg: CfgNode) -> SampleStore:
    """The sample store of DATASETS.TRAIN; several folders are parts of one.

    Raises:
        RunConfigError: none is named.
    """
    if not cfg.DATASETS.TRAIN:
        raise RunConfigError(
            "DATASETS.TRAIN names no sample store; give the folder that extract_samples.py wrote: "
            "DATASETS.TRAIN \"('STORE',)\""
        )
    return SampleStore(list(cfg.DATASETS.TRAIN))


def check_device(cfg: CfgNode) -> None:
    """Refuse MODEL.DEVICE cuda on a machine without it.

    Raises:
        RunConfigError: with the key to set.
    """
    if torch.device(cfg.MODEL.DEVICE).type == "cuda" and not torch.cuda.is_available():
        raise RunConfigError("MODEL.DEVICE is cuda, but PyTorch sees no GPU; add MODEL.DEVICE cpu")


def warn_of_changes(cfg: CfgNode, saved: str) -> list[str]:
    """Log what differs from the config of the checkpoint that is resumed; returns the lines.

    Args:
        cfg: of this run.
        saved: YAML of the run that wrote the checkpoint.
    """
    now, then = dict(_flat(yaml.safe_load(cfg.dump()))), dict(_flat(yaml.safe_load(saved)))
    lines = [
        f"{key}: {then.get(key)} -> {now.get(key)}"
        for key in sorted(set(now) | set(then))
        if now.get(key) != then.get(key) and not key.startswith(_FREE_KEYS)
    ]
    if lines:
        logger.warning("resuming with other settings than before: %s", "; ".join(lines))
    return lines


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _draw_seed(folder: Path) -> int:
    """Of the run in ``folder``, so that a resume sees the same images; else new, on every rank."""
    marker = folder / "last_checkpoint"
    if marker.is_file():
        return int(
            read_checkpoint(folder / marker.read_text().strip())["jigsaw"]["sampler"]["seed"]
        )
    return int(comm.shared_random_seed() % 2**31)


def _check_batch(cfg: CfgNode, world_size: int) -> None:
    batch, steps = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATION_STEPS
    if steps < 1 or batch % (world_size * steps):
        raise RunConfigError(
            f"SOLVER.IMS_PER_BATCH {batch} does not divide into {world_size} process(es) x "
            f"SOLVER.ACCUMULATION_STEPS {steps}; change one of them"
        )

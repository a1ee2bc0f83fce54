"""A configuration as one run on this machine uses it: all "auto", 0 or scaled made definite."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.utils import comm

from jigsaw_d2.config import (
    check_trainable_config,
    flatten,
    get_jigsaw_cfg,
    in_features,
    resolve_norm,
    scale_to_batch,
)
from jigsaw_d2.data.arrays import channels_of
from jigsaw_d2.data.build import fit_input
from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.engine.precision import is_settled, settle_precision
from jigsaw_d2.engine.state import read_checkpoint
from jigsaw_d2.io import ConfigError
from jigsaw_d2.modeling.backbones import build_backbone

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


def resolve_config(
    cfg: CfgNode, store: SampleStore, world_size: int = 1, explicit: Sequence[str] = ()
) -> CfgNode:
    """The frozen config of a run; resolving it again changes nothing.

    1. Batch: IMS_PER_BATCH divides over ranks and ACCUMULATION_STEPS; rate and lengths scaled once.
    2. Machine: MODEL.DEVICE exists; the norm of "auto" is chosen.
    3. Data: NUM_CLASSES is the store's; INPUT.JIGSAW.FIT_TO "auto" sets what is not ``explicit``.
    4. Nothing is frozen, and the classified feature is built.
    5. Chance and trials: a SEED below 0, AMP.DTYPE "auto" and CHANNELS_LAST None become what
       OUTPUT_DIR's run has, or new ones; the same on every rank.

    Args:
        explicit: keys that the user has set, as against the config file.

    Raises:
        ConfigError: naming the key.
    """
    cfg = scale_to_batch(cfg)
    cfg.defrost()
    _check_batch(cfg, world_size)
    use_device(cfg, world_size)
    for part in ("RESNETS", "FPN"):
        cfg.MODEL[part].NORM = resolve_norm(cfg, world_size, part)
    classes = len(store.categories)
    if cfg.MODEL.JIGSAW.NUM_CLASSES not in (0, classes):
        raise ConfigError(
            f"MODEL.JIGSAW.NUM_CLASSES is {cfg.MODEL.JIGSAW.NUM_CLASSES}, but the store "
            f"{', '.join(cfg.DATASETS.TRAIN)} has {classes} categories; set that or 0"
        )
    cfg.MODEL.JIGSAW.NUM_CLASSES = classes
    use_store_input(cfg, store, explicit)
    check_trainable_config(cfg)
    if cfg.INPUT.JIGSAW.FIT_TO:
        with torch.device("meta"):
            shapes = build_backbone(cfg).output_shape()
        # A feature that is not there is refused, with the others named, where the network is built.
        stride = max((shapes[n].stride for n in in_features(cfg) if n in shapes), default=32)
        fit_input(cfg, store, stride, explicit)
    if cfg.SEED < 0 or not is_settled(cfg):
        decided = comm.all_gather(_decide(cfg) if comm.is_main_process() else [])[0]
        cfg.merge_from_list(decided)
    cfg.freeze()
    return cfg


def use_store_input(cfg: CfgNode, store: SampleStore, explicit: Sequence[str] = ()) -> None:
    """Set INPUT.FORMAT, PIXEL_MEAN and PIXEL_STD to those of a store of arrays, in place.

    Raises:
        ConfigError: an ``explicit`` value of another number of channels.
    """
    if "pixel_mean" not in store.header:
        return
    if "INPUT.FORMAT" not in explicit and channels_of(cfg.INPUT.FORMAT) != store.channels:
        cfg.INPUT.FORMAT = f"C{store.channels}"
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        if f"MODEL.{key}" not in explicit:
            cfg.MODEL[key] = store.header[key.lower()]
    counts = {
        "INPUT.FORMAT": (cfg.INPUT.FORMAT, channels_of(cfg.INPUT.FORMAT)),
        "MODEL.PIXEL_MEAN": (cfg.MODEL.PIXEL_MEAN, len(cfg.MODEL.PIXEL_MEAN)),
        "MODEL.PIXEL_STD": (cfg.MODEL.PIXEL_STD, len(cfg.MODEL.PIXEL_STD)),
    }
    for key, (value, count) in counts.items():
        if count != store.channels:
            raise ConfigError(f"{key} is {value}, but the store has {store.channels} channels")


def open_store(cfg: CfgNode) -> SampleStore:
    """The sample store of DATASETS.TRAIN; several folders are parts of one.

    Raises:
        ConfigError: none is named.
    """
    if not cfg.DATASETS.TRAIN:
        raise ConfigError(
            "DATASETS.TRAIN names no sample store; give the folder that extract_samples.py wrote: "
            "DATASETS.TRAIN \"('STORE',)\""
        )
    return SampleStore(list(cfg.DATASETS.TRAIN))


def check_held_out(cfg: CfgNode, store: SampleStore) -> None:
    """Refuse held-out stores whose class numbers or pixels mean other things than ``store``'s.

    Raises:
        ConfigError: with both lists of categories, or kinds of pixels.
        DataError: one of DATASETS.TEST is no store.
    """
    held_out = SampleStore(list(cfg.DATASETS.TEST)) if cfg.DATASETS.TEST else store
    if held_out.categories != store.categories:
        raise ConfigError(
            f"DATASETS.TEST {', '.join(cfg.DATASETS.TEST)} has the categories "
            f"{held_out.categories}, DATASETS.TRAIN {store.categories}: extract both from sets "
            "with the same names in the same order of their ids"
        )
    theirs, ours = (f"{s.channels} channels of {s.dtype}" for s in (held_out, store))
    if theirs != ours:
        tests = ", ".join(cfg.DATASETS.TEST)
        raise ConfigError(f"DATASETS.TEST {tests} has {theirs}, DATASETS.TRAIN {ours}")


def use_device(cfg: CfgNode, world_size: int = 1) -> None:
    """Make MODEL.DEVICE this process's current device, whose streams and figures are meant.

    Raises:
        ConfigError: it does not exist, or several processes would share it.
    """
    device = torch.device(cfg.MODEL.DEVICE)
    if device.type != "cuda":
        return
    if not torch.cuda.is_available():
        raise ConfigError("MODEL.DEVICE is cuda, but PyTorch sees no GPU; add MODEL.DEVICE cpu")
    if device.index is None:
        return
    if world_size > 1:
        raise ConfigError(
            f"MODEL.DEVICE is {device} with {world_size} processes, each of which has its own GPU; "
            "set MODEL.DEVICE cuda, and choose GPUs by CUDA_VISIBLE_DEVICES"
        )
    if device.index >= torch.cuda.device_count():
        raise ConfigError(
            f"MODEL.DEVICE is {device}, but PyTorch sees {torch.cuda.device_count()} GPU(s), "
            "counted from cuda:0"
        )
    torch.cuda.set_device(device)


def warn_of_changes(cfg: CfgNode, saved: str) -> list[str]:
    """Log what differs from the config of the checkpoint that is resumed; returns the lines.

    Args:
        cfg: of this run.
        saved: YAML of the run that wrote the checkpoint.
    """
    # Keys that are newer than the checkpoint had, in effect, their defaults.
    texts = (cfg.dump(), get_jigsaw_cfg().dump(), saved)
    now, defaults, then = (dict(flatten(yaml.safe_load(text))) for text in texts)
    then = defaults | then
    lines = [
        f"{key}: {then.get(key)} -> {now.get(key)}"
        for key in sorted(set(now) | set(then))
        if now.get(key) != then.get(key) and not key.startswith(_FREE_KEYS)
    ]
    if lines:
        logger.warning("resuming with other settings than before: %s", "; ".join(lines))
    return lines


def _decide(cfg: CfgNode) -> list[Any]:
    """KEY, VALUE ... of what ``cfg`` leaves open: as the run in OUTPUT_DIR has it, else new."""
    cfg = cfg.clone()
    earlier = _earlier_config(Path(cfg.OUTPUT_DIR))
    if cfg.SEED < 0:
        cfg.SEED = earlier.get("SEED", int.from_bytes(os.urandom(4), "little") % 2**31)
    amp, formats = cfg.SOLVER.AMP, cfg.MODEL.JIGSAW
    if formats.CHANNELS_LAST is None:
        formats.CHANNELS_LAST = earlier.get("MODEL.JIGSAW.CHANNELS_LAST")
    if amp.ENABLED and amp.DTYPE == "auto":
        amp.ENABLED = earlier.get("SOLVER.AMP.ENABLED", True)
        amp.DTYPE = earlier.get("SOLVER.AMP.DTYPE", "auto")
    cfg = settle_precision(cfg)
    keys = {
        "SEED": cfg.SEED,
        "MODEL.JIGSAW.CHANNELS_LAST": cfg.MODEL.JIGSAW.CHANNELS_LAST,
        "SOLVER.AMP.ENABLED": cfg.SOLVER.AMP.ENABLED,
        "SOLVER.AMP.DTYPE": cfg.SOLVER.AMP.DTYPE,
    }
    return [item for pair in keys.items() for item in pair]


def _earlier_config(folder: Path) -> dict[str, Any]:
    """The config, by full keys, of the run whose last checkpoint lies in ``folder``; {} if none."""
    marker = folder / "last_checkpoint"
    if not marker.is_file():
        return {}
    checkpoint = read_checkpoint(folder / marker.read_text().strip())
    return dict(flatten(yaml.safe_load(checkpoint["jigsaw"]["config"])))


def _check_batch(cfg: CfgNode, world_size: int) -> None:
    batch, steps = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATION_STEPS
    if steps < 1 or batch % (world_size * steps):
        share = world_size * max(steps, 1)
        low, high = max(batch // share, 1) * share, -(-batch // share) * share
        fit = [n for n in range(1, 65) if batch % (n * max(steps, 1)) == 0]
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH {batch} does not divide into {world_size} process(es) x "
            f"SOLVER.ACCUMULATION_STEPS {steps}; set it to {low} or {high} (the rate and the "
            f"schedule follow), or use one of {', '.join(map(str, fit)) or 'no'} process(es)"
        )

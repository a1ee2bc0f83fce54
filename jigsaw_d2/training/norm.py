"""Normalisation layers in pre-training: chosen for the machine, trainable, equal on every rank."""

import logging

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.utils import comm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from jigsaw_d2.config import AUTO_NORM
from jigsaw_d2.errors import JigsawError

logger = logging.getLogger(__name__)

# Images per forward pass of one GPU below which batch statistics are taken over all GPUs. The paper
# has 64; 16 is where group norm's authors find batch norm's error to start rising.
MIN_IMAGES_PER_GPU = 16
_SYNC_NORMS = ("SyncBN", "naiveSyncBN", "nnSyncBN", "naiveSyncBN_N")


class FrozenError(JigsawError, ValueError):
    """Something would stay at its random initialisation."""


def resolve_norm(cfg: CfgNode, world_size: int) -> str:
    """The norm that MODEL.RESNETS.NORM stands for on this machine, said in the log when chosen.

    "auto" is SyncBN where several GPUs see few images each, and BN elsewhere. A synchronised norm
    on one process or on a CPU, where it cannot run, becomes BN, which computes the same there.
    """
    norm = cfg.MODEL.RESNETS.NORM
    on_gpu = torch.device(cfg.MODEL.DEVICE).type == "cuda"
    can_sync = on_gpu and world_size > 1
    images = cfg.SOLVER.IMS_PER_BATCH // (world_size * cfg.SOLVER.ACCUMULATION_STEPS)
    if norm == AUTO_NORM:
        chosen = "SyncBN" if can_sync and images < MIN_IMAGES_PER_GPU else "BN"
        where = f"{world_size} process(es) on {'GPU' if on_gpu else 'CPU'}, {images} images each"
        if chosen == "SyncBN":
            where += f"; from {MIN_IMAGES_PER_GPU} on it would be BN, faster: SyncBN waits a layer"
        logger.info("MODEL.RESNETS.NORM auto -> %s (%s)", chosen, where)
        return chosen
    if norm in _SYNC_NORMS and world_size == 1:
        logger.info("MODEL.RESNETS.NORM %s -> BN: one process has nothing to synchronise", norm)
        return "BN"
    if norm in _SYNC_NORMS and not on_gpu:
        raise FrozenError(
            f"MODEL.RESNETS.NORM is {norm}, which does not run on MODEL.DEVICE {cfg.MODEL.DEVICE}; "
            "choose BN, GN or auto"
        )
    return norm


def check_trainable_config(cfg: CfgNode) -> None:
    """Refuse settings that freeze layers, or that do not build the classified feature.

    Detectron2's defaults do both: they are made for fine-tuning.

    Raises:
        FrozenError: naming the key, its value and the value it should have.
    """
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    if freeze_at > 0:
        raise FrozenError(
            f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}: the stem would stay random; set it to 0"
        )
    if "resnet" not in cfg.MODEL.BACKBONE.NAME:
        return
    resnets, feature = cfg.MODEL.RESNETS, cfg.MODEL.JIGSAW.IN_FEATURE
    if resnets.NORM == "FrozenBN":
        raise FrozenError(
            "MODEL.RESNETS.NORM is FrozenBN: statistics would stay those of no data; "
            "set BN, SyncBN, GN or auto"
        )
    if "fpn" not in cfg.MODEL.BACKBONE.NAME and feature not in resnets.OUT_FEATURES:
        raise FrozenError(
            f"MODEL.RESNETS.OUT_FEATURES is {list(resnets.OUT_FEATURES)} without "
            f"MODEL.JIGSAW.IN_FEATURE {feature}, which would not be built; add it"
        )


def check_trainable(model: nn.Module) -> None:
    """Refuse a built model with a frozen norm or parameter, whatever key or code froze it.

    Raises:
        FrozenError: naming the first few layers.
    """
    frozen = [name for name, m in model.named_modules() if isinstance(m, FrozenBatchNorm2d)]
    fixed = [name for name, p in model.named_parameters() if not p.requires_grad]
    for names, what in ((frozen, "frozen batch norms"), (fixed, "parameters without gradient")):
        if names:
            raise FrozenError(
                f"{len(names)} {what} ({', '.join(names[:3])} ...): see MODEL.RESNETS.NORM and "
                "MODEL.BACKBONE.FREEZE_AT, or the backbone's own code"
            )


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Replace every batch norm's running statistics by their mean over the ranks.

    Plain batch norm sees only its rank's images; evaluation, ERF and checkpoint use one model. Does
    nothing on one process.
    """
    if comm.get_world_size() == 1:
        return
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for buffer in (b for m in norms for b in (m.running_mean, m.running_var)):
        torch.distributed.all_reduce(buffer)
        buffer /= comm.get_world_size()

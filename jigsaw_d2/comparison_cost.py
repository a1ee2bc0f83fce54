"""What a comparison will cost, before it runs: FLOPs by counting, seconds by timing a few steps."""

import time
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone

from jigsaw_d2.comparison_plan import Arm, Plan
from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.cost import TRAIN_FORWARDS, backbone_flops
from jigsaw_d2.finetune_config import load_detection_config
from jigsaw_d2.lr_schedule import scale_to_batch
from jigsaw_d2.pipeline import DetectionSet
from jigsaw_d2.report_markdown import table

_TRIAL_IMAGES = 4
_TRIAL_STEPS = 2


@dataclass(frozen=True)
class Estimate:
    """Of one run: optimiser steps and backbone FLOPs of both trainings."""

    pretrain_iterations: int
    detection_iterations: int
    pretrain_flops: float
    detection_flops: float


def estimate(plan: Plan, arm: Arm) -> Estimate:
    """What one run of ``arm`` computes; for arms from scratch under "total", by FLOPs alone.

    The comparison itself sets their length by the ledger, so it will differ somewhat.
    """
    detector = load_detection_config(plan.detector_config, list(plan.detector))
    iterations = plan.detection_iterations or detector.SOLVER.MAX_ITER
    step = detection_step_flops(detector)
    if arm.kind == "jigsaw":
        length, flops = pretraining_flops(plan, arm)
        return Estimate(length, iterations, flops, iterations * step)
    if arm.kind == "scratch" and plan.budget == "total":
        paid = [pretraining_flops(plan, other)[1] for other in plan.arms if other.kind == "jigsaw"]
        iterations += round(max(paid, default=0.0) / step)
    return Estimate(0, iterations, 0.0, iterations * step)


def pretraining_flops(plan: Plan, arm: Arm) -> tuple[int, float]:
    """Optimiser steps of an arm's pre-training, and the backbone's FLOPs."""
    cfg = scale_to_batch(get_jigsaw_cfg(plan.pretrain_config, [*plan.pretrain, *arm.pretrain]))
    iterations = max(1, round((plan.pretrain_iterations or cfg.SOLVER.MAX_ITER) * arm.length))
    height, width = cfg.INPUT.JIGSAW.TEMPLATE_SIZE
    image = backbone_flops(cfg, height, width) * TRAIN_FORWARDS
    return iterations, float(iterations * cfg.SOLVER.IMS_PER_BATCH * image)


def detection_step_flops(cfg: CfgNode) -> float:
    """Backbone FLOPs of one detection step, on images of the least training size and aspect 4:3."""
    side = int(min(cfg.INPUT.MIN_SIZE_TRAIN))
    height, width = (max(32, round(length / 32) * 32) for length in (side, side * 4 / 3))
    cfg = cfg.clone()
    cfg.MODEL.RESNETS.NORM = "BN"
    return float(cfg.SOLVER.IMS_PER_BATCH * TRAIN_FORWARDS * backbone_flops(cfg, height, width))


def measured_flops_per_second(cfg: CfgNode) -> float:
    """FLOPs per second of training steps of a pre-training config's backbone on its device."""
    cfg = cfg.clone()
    cfg.MODEL.RESNETS.NORM = "BN"
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    backbone = build_backbone(cfg).to(cfg.MODEL.DEVICE).train()
    height, width = cfg.INPUT.JIGSAW.TEMPLATE_SIZE
    images = torch.zeros(_TRIAL_IMAGES, 3, height, width, device=cfg.MODEL.DEVICE)
    times = []
    for _ in range(_TRIAL_STEPS):
        start = time.perf_counter()
        backbone(images)[cfg.MODEL.JIGSAW.IN_FEATURE].sum().backward()
        if images.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    flops = TRAIN_FORWARDS * backbone_flops(backbone, height, width) * _TRIAL_IMAGES
    return flops / min(times)


def dry_run_table(plan: Plan, data: DetectionSet) -> str:
    """Every arm with its runs, lengths and estimated cost, as a Markdown table."""
    speed = measured_flops_per_second(get_jigsaw_cfg(plan.pretrain_config, list(plan.pretrain)))
    rows = [
        ["arm", "seeds", "pre-training steps", "detection steps", "PFLOPs a run", "minutes a run"]
    ]
    total = 0.0
    for arm in plan.arms:
        cost = estimate(plan, arm)
        flops = cost.pretrain_flops + cost.detection_flops
        total += flops * len(plan.seeds)
        rows.append(
            [
                arm.name,
                " ".join(str(seed + arm.seed_offset) for seed in plan.seeds),
                str(cost.pretrain_iterations or "-"),
                str(cost.detection_iterations),
                f"{flops / 1e15:.3f}",
                f"{flops / speed / 60:.1f}",
            ]
        )
    runs = len(plan.arms) * len(plan.seeds)
    return (
        f"{table(rows)}\n\n{runs} runs on {data.name}: {total / 1e15:.2f} PFLOPs of the backbone, "
        f"about {total / speed / 60:.0f} minutes at the {speed / 1e9:.0f} GFLOP/s that a trial of "
        "its training step reached in float32 here; start-up, RoI heads and evaluation come on "
        "top. Arms from scratch get their true length from the ledger when the others are done."
    )

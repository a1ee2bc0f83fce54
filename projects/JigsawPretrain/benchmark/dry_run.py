"""What a comparison will cost, before it runs: FLOPs by counting, seconds by a trial."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from detectron2.config import CfgNode
from tabulate import tabulate

from benchmark.plan import Arm, Plan
from jigsaw_d2.config import get_jigsaw_cfg, scale_to_batch
from jigsaw_d2.cost import TRAIN_FORWARDS, backbone_flops
from jigsaw_d2.detection.config import load_detection_config
from jigsaw_d2.tools.job import Job
from jigsaw_d2.tools.pipeline import DetectionSet
from jigsaw_d2.tools.time_budget import Trial

TRIAL_IMAGES = 64  # of each split: enough to learn the speed of a step, cut within seconds


@dataclass(frozen=True)
class Estimate:
    """Of one run: optimiser steps and backbone FLOPs of both trainings, and their seconds."""

    pretrain_iterations: int
    detection_iterations: int
    flops: float
    seconds: float


def dry_run_table(plan: Plan, name: str, trial: Trial | None) -> str:
    """Every arm with its runs, lengths and estimated cost, as Markdown.

    Args:
        name: of the dataset.
        trial: the speeds of this machine; None = unknown, seconds are left out.
    """
    rows, flops, seconds = [], 0.0, 0.0
    for arm in plan.arms:
        cost = estimate(plan, arm, trial)
        flops += cost.flops * len(plan.seeds)
        seconds += cost.seconds * len(plan.seeds)
        seeds = " ".join(str(seed + arm.seed_offset) for seed in plan.seeds)
        minutes = f"{cost.seconds / 60:.1f}" if trial else "-"
        steps = (cost.pretrain_iterations or "-", cost.detection_iterations)
        rows.append([arm.name, seeds, *steps, f"{cost.flops / 1e15:.3f}", minutes])
    head = ["arm", "seeds", "pre-training steps", "detection steps", "PFLOPs a run"]
    head += ["minutes a run"]
    speed = "No GPU here, which this plan trains on: its time is not estimated. "
    if trial:
        speed = (
            f"About {seconds / 60:.0f} minutes of training: a trial here took "
            f"{trial.pretrain_step:.3f} s a step of pre-training, {trial.erf_refresh:.1f} s an ERF "
            f"refresh and {trial.detection_step:.3f} s a step of the detector; start-up, "
            "extraction and evaluation come on top. "
        )
    return (
        f"{tabulate(rows, head, tablefmt='pipe', disable_numparse=True)}\n\n"
        f"{len(rows) * len(plan.seeds)} runs on {name}: {flops / 1e15:.2f} PFLOPs of the backbone. "
        f"{speed}Arms without Jigsaw pre-training get their true length from the ledger when those "
        "with it are done."
    )


def estimate(plan: Plan, arm: Arm, trial: Trial | None) -> Estimate:
    """What one run of ``arm`` takes; the ledger will set the true length of those from scratch."""
    detector = load_detection_config(plan.detector_config, plan.detector, plan.trust)
    detection = plan.detection_iterations or detector.SOLVER.MAX_ITER
    step_flops, step = detection_step_flops(detector), trial.detection_step if trial else 0.0
    steps, flops, seconds = 0, 0.0, 0.0
    if arm.kind == "jigsaw":
        steps, flops, seconds = pretraining_cost(plan, arm, trial)
    jigsaw = (other for other in plan.arms if other.kind == "jigsaw")
    paid = [pretraining_cost(plan, other, trial) for other in jigsaw] if arm.waits else []
    if arm.kind in ("direct", "lightly"):  # in steps of their own, which no trial here has timed
        flops, seconds = (max(cost[i] for cost in paid) for i in (1, 2))
    elif plan.budget == "total":
        in_flops = plan.cost == "flops" or trial is None
        extra = [cost[1] / step_flops if in_flops else cost[2] / step for cost in paid]
        detection += math.ceil(max(extra, default=0))
    return Estimate(steps, detection, flops + detection * step_flops, seconds + detection * step)


def pretraining_cost(plan: Plan, arm: Arm, trial: Trial | None) -> tuple[int, float, float]:
    """Optimiser steps of an arm's pre-training, the backbone's FLOPs; seconds, ERF included."""
    overrides = [*plan.pretrain, *arm.pretrain]
    cfg = scale_to_batch(get_jigsaw_cfg(plan.pretrain_config, overrides, plan.trust))
    steps = max(1, round((plan.pretrain_iterations or cfg.SOLVER.MAX_ITER) * arm.length))
    image = backbone_flops(cfg, *cfg.INPUT.JIGSAW.TEMPLATE_SIZE) * TRAIN_FORWARDS
    seconds = 0.0
    if trial:
        refreshes = math.ceil(steps / cfg.MODEL.JIGSAW.ERF.PERIOD)
        seconds = steps * trial.pretrain_step + refreshes * trial.erf_refresh
    return steps, float(steps * cfg.SOLVER.IMS_PER_BATCH * image), seconds


def detection_step_flops(cfg: CfgNode) -> float:
    """Backbone FLOPs of one detection step, on images of ``detection_size``."""
    image = backbone_flops(cfg, *detection_size(cfg))
    return float(cfg.SOLVER.IMS_PER_BATCH * TRAIN_FORWARDS * image)


def detection_size(cfg: CfgNode) -> tuple[int, int]:
    """(height, width) in pixels, multiples of 32, of an image of aspect 4:3 as training sees it."""
    short = min(float(min(cfg.INPUT.MIN_SIZE_TRAIN)), cfg.INPUT.MAX_SIZE_TRAIN * 3 / 4)
    return tuple(max(32, math.ceil(side / 32) * 32) for side in (short, short * 4 / 3))


def measure(plan: Plan, data: DetectionSet) -> Trial | None:
    """Speeds of both trainings as ``run --hours`` measures them: the commands, a few steps long.

    They train on this machine's GPUs, in the real batch, on the first images of ``data``.

    Returns:
        None where the plan trains on GPUs and this machine has none.
    """
    with TemporaryDirectory() as folder:
        pipeline = plan.pipeline(first_images(data, Path(folder)))
        device = pipeline.pretrain_cfg(plan.pretrain).MODEL.DEVICE
        if device.startswith("cuda") and not torch.cuda.is_available():
            return None
        job = Job(pipeline, Path(folder), plan.pretrain, plan.detector)
        job.extract()
        return job.trial()


def first_images(data: DetectionSet, folder: Path) -> DetectionSet:
    """The first TRIAL_IMAGES annotated images of both splits, their annotations in ``folder``."""
    for name, path in (("train", data.train_json), ("val", data.val_json)):
        content = json.loads(path.read_text())
        used = {entry["image_id"] for entry in content["annotations"]}
        images = [image for image in content["images"] if image["id"] in used][:TRIAL_IMAGES]
        kept = {image["id"] for image in images}
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
        (folder / f"{name}.json").write_text(json.dumps({**content, "images": images}))
    files = (folder / "train.json", data.train_images, folder / "val.json", data.val_images)
    return DetectionSet(data.name, *files)

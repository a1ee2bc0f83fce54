"""What a comparison will cost before it runs: lengths, and minutes by a trial of its trainings."""

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tabulate import tabulate

from benchmark.plan import Arm, Plan
from jigsaw_d2.config import get_jigsaw_cfg, scale_to_batch
from jigsaw_d2.data.sources import image_number
from jigsaw_d2.detection.config import load_detection_config
from jigsaw_d2.tools.job import Job
from jigsaw_d2.tools.pipeline import DetectionSet
from jigsaw_d2.tools.time_budget import Trial

TRIAL_IMAGES = 64  # of each split: enough to learn the speed of a step, cut within seconds


def dry_run_table(plan: Plan, name: str, trial: Trial | None) -> str:
    """Every arm with its runs, lengths and estimated minutes, as Markdown.

    Args:
        name: of the dataset.
        trial: the speeds of this machine; None = unknown, what follows from them is left out.
    """
    rows, total = [], 0.0
    for arm in plan.arms:
        pretraining, detection, seconds = estimate(plan, arm, trial)
        total += seconds * len(plan.seeds)
        seeds = " ".join(str(seed + arm.seed_offset) for seed in plan.seeds)
        more = " or more" * (trial is None and arm.waits and plan.budget == "total")
        minutes = f"{seconds / 60:.1f}" if trial else "-"
        rows.append([arm.name, seeds, pretraining or "-", f"{detection}{more}", minutes])
    head = ["arm", "seeds", "pre-training steps", "detection steps", "minutes a run"]
    speed = "No GPU here, which this plan trains on: its time is not estimated."
    if trial:
        speed = (
            f"About {total / 60:.0f} minutes of training: a trial here took "
            f"{trial.pretrain_step:.3f} s a step of pre-training, {trial.erf_refresh:.1f} s an ERF "
            f"refresh and {trial.detection_step:.3f} s a step of the detector; start-up, "
            "extraction and evaluation come on top."
        )
    return (
        f"{tabulate(rows, head, tablefmt='pipe', disable_numparse=True)}\n\n"
        f"{len(rows) * len(plan.seeds)} runs on {name}. {speed} Arms without Jigsaw pre-training "
        "get their true length from the cost logs when those with it are done."
    )


def estimate(plan: Plan, arm: Arm, trial: Trial | None) -> tuple[int, int, float]:
    """Steps of pre-training and of the detector, and seconds of both, of one run of ``arm``."""
    cfg = load_detection_config(plan.detector_config, plan.detector, plan.trust)
    detection = plan.detection_iterations or cfg.SOLVER.MAX_ITER
    steps, seconds = pretraining_cost(plan, arm, trial) if arm.kind == "jigsaw" else (0, 0.0)
    if trial is None:
        return steps, detection, 0.0
    if arm.waits:  # for the arms that pre-train, and then has as much time
        jigsaw = (other for other in plan.arms if other.kind == "jigsaw")
        paid = max((pretraining_cost(plan, other, trial)[1] for other in jigsaw), default=0.0)
        if arm.kind in ("direct", "lightly"):  # in steps of their own, which no trial has timed
            seconds = paid
        elif plan.budget == "total":
            detection += math.ceil(paid / trial.detection_step)
    return steps, detection, seconds + detection * trial.detection_step


def pretraining_cost(plan: Plan, arm: Arm, trial: Trial | None) -> tuple[int, float]:
    """Optimiser steps of an arm's pre-training; its seconds, ERF included, 0 without a trial."""
    overrides = [*plan.pretrain, *arm.pretrain]
    cfg = scale_to_batch(get_jigsaw_cfg(plan.pretrain_config, overrides, plan.trust))
    steps = max(1, round((plan.pretrain_iterations or cfg.SOLVER.MAX_ITER) * arm.length))
    if trial is None:
        return steps, 0.0
    refreshes = math.ceil(steps / cfg.MODEL.JIGSAW.ERF.PERIOD)
    return steps, steps * trial.pretrain_step + refreshes * trial.erf_refresh


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
        content = json.loads(path.read_bytes())
        used = {image_number(entry["image_id"]) for entry in content["annotations"]}
        images = [image for image in content["images"] if image_number(image["id"]) in used]
        images = images[:TRIAL_IMAGES]
        kept, boxes = {image_number(image["id"]) for image in images}, content["annotations"]
        content["annotations"] = [box for box in boxes if image_number(box["image_id"]) in kept]
        (folder / f"{name}.json").write_text(json.dumps({**content, "images": images}))
    files = (folder / "train.json", data.train_images, folder / "val.json", data.val_images)
    return DetectionSet(data.name, *files)

"""What a comparison will cost, before it runs: FLOPs by counting, seconds by timing a few steps."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from tabulate import tabulate

from benchmark.plan import Arm, Plan
from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.cost import TRAIN_FORWARDS, backbone_flops
from jigsaw_d2.detection.finetune_config import load_detection_config
from jigsaw_d2.training.lr_schedule import scale_to_batch
from jigsaw_d2.training.precision import Precision

_TRIAL_STEPS = 3  # the fastest counts
_TRIAL_SECONDS = 10.0  # of each training, after which no larger batch is tried


@dataclass(frozen=True)
class Speed:
    """Wall-clock seconds of one optimiser step of each training, without data loading."""

    pretrain_step: float
    detection_step: float


@dataclass(frozen=True)
class Estimate:
    """Of one run: optimiser steps and backbone FLOPs of both trainings, and their seconds."""

    pretrain_iterations: int
    detection_iterations: int
    flops: float
    seconds: float


def dry_run_table(plan: Plan, name: str, speed: Speed | None = None) -> str:
    """Every arm with its runs, lengths and estimated cost, as Markdown.

    Args:
        name: of the dataset.
        speed: of this machine; None = measure it.
    """
    speed = speed or measured_speed(plan)
    rows, flops, seconds = [], 0.0, 0.0
    for arm in plan.arms:
        cost = estimate(plan, arm, speed)
        flops += cost.flops * len(plan.seeds)
        seconds += cost.seconds * len(plan.seeds)
        seeds = " ".join(str(seed + arm.seed_offset) for seed in plan.seeds)
        steps = (cost.pretrain_iterations or "-", cost.detection_iterations)
        row = [arm.name, seeds, *steps, f"{cost.flops / 1e15:.3f}", f"{cost.seconds / 60:.1f}"]
        rows.append(row)
    head = [
        "arm",
        "seeds",
        "pre-training steps",
        "detection steps",
        "PFLOPs a run",
        "minutes a run",
    ]
    return (
        f"{tabulate(rows, head, tablefmt='pipe', disable_numparse=True)}\n\n"
        f"{len(rows) * len(plan.seeds)} runs on {name}: {flops / 1e15:.2f} PFLOPs of the backbone, "
        f"about {seconds / 60:.0f} minutes of training. A trial here took "
        f"{speed.pretrain_step:.3f} s a step of pre-training and {speed.detection_step:.3f} s of "
        "the detector; start-up, data, ERF refreshes and evaluation come on top. Arms from scratch "
        "get their true length from the ledger when the others are done."
    )


def estimate(plan: Plan, arm: Arm, speed: Speed) -> Estimate:
    """What one run of ``arm`` takes; the ledger will set the true length of those from scratch."""
    detector = load_detection_config(plan.detector_config, plan.detector)
    detection = plan.detection_iterations or detector.SOLVER.MAX_ITER
    step = detection_step_flops(detector)
    pretrain, flops = pretraining_flops(plan, arm) if arm.kind == "jigsaw" else (0, 0.0)
    if arm.kind == "scratch" and plan.budget == "total":
        paid = [pretraining_flops(plan, other) for other in plan.arms if other.kind == "jigsaw"]
        steps, paid_flops = max(paid, default=(0, 0.0))
        seconds = steps * speed.pretrain_step
        extra = paid_flops / step if plan.cost == "flops" else seconds / speed.detection_step
        detection += math.ceil(extra)
    seconds = pretrain * speed.pretrain_step + detection * speed.detection_step
    return Estimate(pretrain, detection, flops + detection * step, seconds)


def pretraining_flops(plan: Plan, arm: Arm) -> tuple[int, float]:
    """Optimiser steps of an arm's pre-training, and the backbone's FLOPs."""
    cfg = pretraining_cfg(plan, arm.pretrain)
    iterations = max(1, round((plan.pretrain_iterations or cfg.SOLVER.MAX_ITER) * arm.length))
    image = backbone_flops(cfg, *cfg.INPUT.JIGSAW.TEMPLATE_SIZE) * TRAIN_FORWARDS
    return iterations, float(iterations * cfg.SOLVER.IMS_PER_BATCH * image)


def pretraining_cfg(plan: Plan, own: tuple[str, ...] = ()) -> CfgNode:
    """The pre-training's config with an arm's ``own`` overrides, scaled to its batch."""
    return scale_to_batch(get_jigsaw_cfg(plan.pretrain_config, [*plan.pretrain, *own]))


def detection_step_flops(cfg: CfgNode) -> float:
    """Backbone FLOPs of one detection step, on images of ``detection_size``."""
    image = backbone_flops(_trial_cfg(cfg), *detection_size(cfg))
    return float(cfg.SOLVER.IMS_PER_BATCH * TRAIN_FORWARDS * image)


def detection_size(cfg: CfgNode) -> tuple[int, int]:
    """(height, width) in pixels, multiples of 32, of an image of aspect 4:3 as training sees it."""
    short = min(float(min(cfg.INPUT.MIN_SIZE_TRAIN)), cfg.INPUT.MAX_SIZE_TRAIN * 3 / 4)
    return tuple(max(32, math.ceil(side / 32) * 32) for side in (short, short * 4 / 3))


def measured_speed(plan: Plan) -> Speed:
    """Time trial steps of both trainings, on noise of the sizes and batches to come.

    One device is timed, with its share of a batch.
    """
    detector = load_detection_config(plan.detector_config, plan.detector)
    speeds = []
    for cfg, trial in ((pretraining_cfg(plan), _pretrain_step), (detector, _detection_step)):
        batch = math.ceil(cfg.SOLVER.IMS_PER_BATCH / plan.num_gpus)
        cfg = _trial_cfg(cfg)
        with EventStorage():
            speeds.append(step_seconds(trial(cfg), batch, cfg.MODEL.DEVICE))
    return Speed(*speeds)


def _trial_cfg(cfg: CfgNode) -> CfgNode:
    """A copy for this process alone: its device exists here, its norm needs no other process."""
    cfg = cfg.clone()
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.WEIGHTS = ""
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def _pretrain_step(cfg: CfgNode) -> Callable[[int], Callable[[], None]]:
    """Number of images -> a forward and backward pass of the backbone on as many."""
    form = torch.channels_last if cfg.MODEL.JIGSAW.CHANNELS_LAST else torch.contiguous_format
    backbone = build_backbone(cfg).to(cfg.MODEL.DEVICE, memory_format=form).train()
    precision = Precision.from_config(cfg)

    def trial(batch: int) -> Callable[[], None]:
        # Noise: on blank images batch norm makes subnormal numbers, with which a CPU crawls.
        images = torch.randn(batch, 3, *cfg.INPUT.JIGSAW.TEMPLATE_SIZE)
        images = images.to(cfg.MODEL.DEVICE, memory_format=form)

        def step() -> None:
            backbone.zero_grad()
            with precision.autocast():
                loss = backbone(images)[cfg.MODEL.JIGSAW.IN_FEATURE].float().sum()
            loss.backward()

        return step

    return trial


def _detection_step(cfg: CfgNode) -> Callable[[int], Callable[[], None]]:
    """Number of images -> a step of the detector on as many, its update included."""
    detector = build_model(cfg).train()
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.0, momentum=0.9)
    height, width = detection_size(cfg)

    def trial(batch: int) -> Callable[[], None]:
        # One object of class 0 over the inner half of an image.
        box = torch.tensor([[width / 4, height / 4, width * 3 / 4, height * 3 / 4]])
        truth = Instances((height, width), gt_boxes=Boxes(box), gt_classes=torch.tensor([0]))
        inputs = [
            {"image": 255 * torch.rand(3, height, width), "instances": truth} for _ in range(batch)
        ]

        def step() -> None:
            optimizer.zero_grad()
            torch.stack(list(detector(inputs).values())).sum().backward()
            optimizer.step()

        return step

    return trial


def step_seconds(
    trial: Callable[[int], Callable[[], None]],
    batch: int,
    device: str,
    limit: float = _TRIAL_SECONDS,
) -> float:
    """Seconds of a step on ``batch`` images, timed on as many as time and memory allow.

    Batches of 1, 2, 4, ... images are tried up to ``batch``; where ``limit`` seconds or the
    device's memory end that early, the largest one is scaled up.

    Args:
        trial: number of images -> a step on as many.
    """
    size, start = 1, time.perf_counter()
    while True:
        began = time.perf_counter()
        try:
            seconds = _fastest(trial(size), device) * batch / size
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            return seconds
        now = time.perf_counter()
        if size == batch or now - start + 2 * (now - began) > limit:  # twice the images, the time
            return seconds
        size = min(2 * size, batch)


def _fastest(step: Callable[[], None], device: str) -> float:
    """Seconds of the fastest of _TRIAL_STEPS calls, after one that allocates and does not count."""
    times = []
    for _ in range(1 + _TRIAL_STEPS):
        start = time.perf_counter()
        step()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])

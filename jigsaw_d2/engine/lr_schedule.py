"""The learning rate of Sec. 4.1, and the one rule that carries it to another batch size."""

import logging
import math

from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier
from detectron2.solver import build_lr_scheduler as build_detectron2_lr_scheduler
from fvcore.common.param_scheduler import ParamScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from jigsaw_d2.errors import JigsawError

logger = logging.getLogger(__name__)

# SOLVER.LR_SCHEDULER_NAME of the paper's schedule. Detectron2's own "WarmupCosineLR" is another
# curve: its cosine starts at iteration 0 and the warm-up ends on it, below BASE_LR.
SCHEDULER_NAME = "WarmupThenCosineLR"


class ScheduleError(JigsawError, ValueError):
    """Solver settings that make no schedule."""


class WarmupThenCosine(ParamScheduler):
    """Multiplier of BASE_LR: a line from ``warmup_factor`` to 1, then half a cosine from 1 to 0.

    With the paper's numbers: 0.2 at iteration 0, 0.8 at 1,250, 0 at 64,000 (Sec. 4.1).
    """

    def __init__(self, warmup_factor: float, warmup_iters: int, max_iter: int) -> None:
        """
        Args:
            warmup_factor: multiplier at iteration 0, in [0, 1].
            warmup_iters: iteration at which the multiplier is 1; 0 = no warm-up. A run that ends
                before it, as a quick trial may, is warm-up throughout.
            max_iter: iteration at which it would be 0, the first that is not run.

        Raises:
            ScheduleError: lengths that are none.
        """
        if warmup_iters < 0 or max_iter < 1:
            raise ScheduleError(
                f"SOLVER.WARMUP_ITERS is {warmup_iters} and SOLVER.MAX_ITER {max_iter}; "
                "the first must be at least 0, the second at least 1"
            )
        self.warmup_factor = warmup_factor
        self.warmup_iters = warmup_iters
        self.max_iter = max_iter

    def __call__(self, where: float) -> float:
        """Multiplier at ``where`` = iteration / max_iter, as Detectron2's LRMultiplier asks."""
        return self.at(round(where * self.max_iter))  # the quotient's rounding is undone

    def at(self, iteration: int) -> float:
        """Multiplier of the step with index ``iteration``."""
        if iteration < self.warmup_iters:
            progress = iteration / self.warmup_iters
            return self.warmup_factor + (1 - self.warmup_factor) * progress
        length = max(self.max_iter - self.warmup_iters, 1)
        return 0.5 * (1 + math.cos(math.pi * (iteration - self.warmup_iters) / length))


def build_lr_scheduler(cfg: CfgNode, optimizer: Optimizer) -> LRScheduler:
    """The schedule that SOLVER.LR_SCHEDULER_NAME names: the paper's, or one of Detectron2's."""
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME != SCHEDULER_NAME:
        return build_detectron2_lr_scheduler(cfg, optimizer)
    if solver.WARMUP_METHOD != "linear":
        raise ScheduleError(
            f"SOLVER.WARMUP_METHOD is {solver.WARMUP_METHOD!r}; {SCHEDULER_NAME} knows 'linear'"
        )
    multiplier = WarmupThenCosine(solver.WARMUP_FACTOR, solver.WARMUP_ITERS, solver.MAX_ITER)
    return LRMultiplier(optimizer, multiplier, solver.MAX_ITER)


def scale_to_batch(cfg: CfgNode) -> CfgNode:
    """A config whose rate and lengths fit IMS_PER_BATCH instead of REFERENCE_BATCH_SIZE.

    With k = IMS_PER_BATCH / REFERENCE_BATCH_SIZE: BASE_LR is multiplied by k; MAX_ITER,
    WARMUP_ITERS, STEPS, CHECKPOINT_PERIOD, EVAL_PERIOD, ERF.PERIOD and ERF.FIRST_ITER are divided
    by k and rounded (what was positive stays at least 1), so that every event happens after as many
    images as before. REFERENCE_BATCH_SIZE becomes IMS_PER_BATCH: scaling the result again, or a
    run's saved config.yaml, changes nothing.

    Args:
        cfg: left as it is.

    Raises:
        ScheduleError: a batch size that is not positive.
    """
    cfg = cfg.clone()
    batch, reference = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_BATCH_SIZE
    if batch < 1 or reference < 0:
        raise ScheduleError(
            f"SOLVER.IMS_PER_BATCH is {batch} and SOLVER.REFERENCE_BATCH_SIZE {reference}; "
            "the first must be positive, the second positive or 0 (off)"
        )
    if reference in (0, batch):
        return cfg
    frozen = cfg.is_frozen()
    cfg.defrost()
    k = batch / reference

    def length(iterations: int) -> int:
        return max(round(iterations / k), 1) if iterations > 0 else iterations

    solver, erf = cfg.SOLVER, cfg.MODEL.JIGSAW.ERF
    solver.BASE_LR *= k
    for node, key in (
        (solver, "MAX_ITER"),
        (solver, "WARMUP_ITERS"),
        (solver, "CHECKPOINT_PERIOD"),
        (cfg.TEST, "EVAL_PERIOD"),
        (erf, "PERIOD"),
        (erf, "FIRST_ITER"),
    ):
        node[key] = length(node[key])
    solver.STEPS = tuple(length(step) for step in solver.STEPS)
    solver.REFERENCE_BATCH_SIZE = batch
    logger.info(
        "batch of %d instead of %d images: BASE_LR %g, MAX_ITER %d, WARMUP_ITERS %d, "
        "ERF.PERIOD %d, CHECKPOINT_PERIOD %d, EVAL_PERIOD %d",
        *(batch, reference, solver.BASE_LR, solver.MAX_ITER, solver.WARMUP_ITERS),
        *(erf.PERIOD, solver.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD),
    )
    if frozen:
        cfg.freeze()
    return cfg

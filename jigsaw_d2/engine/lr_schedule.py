"""The learning rate of Sec. 4.1."""

from detectron2.config import CfgNode
from detectron2.solver import LRMultiplier
from detectron2.solver import build_lr_scheduler as build_detectron2_lr_scheduler
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    ParamScheduler,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from jigsaw_d2.config import SCHEDULER_NAME
from jigsaw_d2.io import ConfigError


def build_lr_scheduler(cfg: CfgNode, optimizer: Optimizer) -> LRScheduler:
    """The schedule that SOLVER.LR_SCHEDULER_NAME names: the paper's, or one of Detectron2's."""
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME != SCHEDULER_NAME:
        return build_detectron2_lr_scheduler(cfg, optimizer)
    if solver.WARMUP_METHOD != "linear":
        raise ConfigError(
            f"SOLVER.WARMUP_METHOD is {solver.WARMUP_METHOD!r}; {SCHEDULER_NAME} knows 'linear'"
        )
    multiplier = warmup_then_cosine(solver.WARMUP_FACTOR, solver.WARMUP_ITERS, solver.MAX_ITER)
    return LRMultiplier(optimizer, multiplier, solver.MAX_ITER)


def warmup_then_cosine(warmup_factor: float, warmup_iters: int, max_iter: int) -> ParamScheduler:
    """Multiplier of BASE_LR: a line from ``warmup_factor`` to 1, then half a cosine from 1 to 0.

    With the paper's numbers: 0.2 at iteration 0, 0.8 at 1,250, 0 at 64,000 (Sec. 4.1). A function
    of iteration / ``max_iter``.

    Args:
        warmup_factor: multiplier at iteration 0, in [0, 1].
        warmup_iters: iteration at which the multiplier is 1; 0 = no warm-up. A run that ends
            before it, as a quick trial may, is warm-up throughout.
        max_iter: iteration at which it would be 0, the first that is not run.

    Raises:
        ConfigError: lengths that are none.
    """
    if warmup_iters < 0 or max_iter < 1:
        raise ConfigError(
            f"SOLVER.WARMUP_ITERS is {warmup_iters} and SOLVER.MAX_ITER {max_iter}; "
            "the first must be at least 0, the second at least 1"
        )
    share = warmup_iters / max_iter
    cosine = CosineParamScheduler(1.0, 0.0)
    if share == 0:
        return cosine
    if share >= 1:
        return LinearParamScheduler(warmup_factor, warmup_factor + (1 - warmup_factor) / share)
    line = LinearParamScheduler(warmup_factor, 1.0)
    return CompositeParamScheduler([line, cosine], [share, 1 - share], ["rescaled"] * 2)

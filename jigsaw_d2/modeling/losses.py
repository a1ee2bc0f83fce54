"""The three pre-training objectives (Sec. 3.3, appendix B) as free functions of the cell logits.

Shape letters: N images; S = 4 regions in the order R1 top-left, R2 top-right, R3 bottom-left,
R4 bottom-right; K classes, background last; h, w feature cells. ``gt_classes`` is int64 (N, S) with
values in [0, K), ``cell_regions`` int64 (h, w) with values in [0, S).

Each objective exists twice: ``*_region_losses`` gives float (N, S), what each region of each image
contributes, for the logs; ``*_loss`` reduces that to the scalar that is trained. ``OBJECTIVES``
names them all: a new one is a row there and a config that names it. All arithmetic is float32 or
wider, whatever precision the logits come in and whatever autocast is on.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

NUM_REGIONS = 4


class Canvas(NamedTuple):
    """What objectives know of a Jigsaw image beside its classes.

    cell_regions: int64 (h, w); area_shares: float (S,), adding up to 1; erf_weights: float
    (S, h, w) of Eq. 2; used: bool (N, h, w), the cells that count, or None where all do.
    """

    cell_regions: Tensor
    area_shares: Tensor
    erf_weights: Tensor
    used: Tensor | None = None


class Objective(NamedTuple):
    """A row of ``OBJECTIVES``.

    region_losses: (logits, gt_classes, canvas) -> float (N, S), each region's contribution.
    reduce: (those, canvas) -> the scalar that is trained.
    needs_erf: whether Eq. 2's weights must be measured.
    """

    region_losses: Callable[[Tensor, Tensor, Canvas], Tensor]
    reduce: Callable[[Tensor, Canvas], Tensor] = lambda region_losses, canvas: region_losses.mean()
    needs_erf: bool = False


def soft_labels(weights: Tensor, gt_classes: Tensor, num_classes: int) -> Tensor:
    """Eq. 1 written out: the label distribution of every cell.

    The losses below never build this; it serves figures and tests.

    Args:
        weights: float (S, h, w), w_1..w_4 of Eq. 2, adding up to 1 in every cell.
        gt_classes: int64 (N, S).
        num_classes: K, background included.

    Returns:
        float (N, K, h, w); regions of equal class add their weights.
    """
    n, (regions, h, w) = len(gt_classes), weights.shape
    index = gt_classes[:, :, None, None].expand(n, regions, h, w)
    labels = weights.new_zeros(n, num_classes, h, w)
    return labels.scatter_add_(1, index, weights.expand(n, regions, h, w))


def erf_adaptive_region_losses(
    logits: Tensor,
    gt_classes: Tensor,
    weights: Tensor,
    cell_regions: Tensor,
    used: Tensor | None = None,
) -> Tensor:
    """Cross-entropy with the soft label of Eq. 1 at every cell, mean over each region's cells.

    Args:
        logits: float (N, K, h, w).
        gt_classes: int64 (N, S).
        weights: float (S, h, w) of Eq. 2.
        cell_regions: int64 (h, w).
        used: bool (N, h, w), the cells that the mean is over; None = all.

    Returns:
        float (N, S).
    """
    with _full_precision(logits):
        nll = _nll_of_regions(logits, gt_classes)  # (N, S, h, w)
        return region_means((weights * nll).sum(dim=1), cell_regions, used)


def block_wise_region_losses(
    logits: Tensor, gt_classes: Tensor, cell_regions: Tensor, used: Tensor | None = None
) -> Tensor:
    """Cross-entropy of each region's average-pooled logits with the region's own class.

    Pooling logits equals pooling features: the average commutes with the 1x1 convolution.

    Returns:
        float (N, S).
    """
    with _full_precision(logits):
        used = None if used is None else used[:, None]
        pooled = region_means(_widen(logits), cell_regions, used)  # (N, K, S)
        return F.cross_entropy(pooled, gt_classes, reduction="none")


def global_region_losses(logits: Tensor, gt_classes: Tensor, used: Tensor | None = None) -> Tensor:
    """-log p of each region's class, p from the average over all cells, or the ``used`` ones.

    Returns:
        float (N, S), not yet weighted by area.
    """
    with _full_precision(logits):
        logits = _widen(logits)
        if used is None:
            return _nll_of_regions(logits.mean(dim=(2, 3)), gt_classes)
        count = used.sum(dim=(1, 2)).clamp_min(1)[:, None]
        return _nll_of_regions((logits * used[:, None]).sum(dim=(2, 3)) / count, gt_classes)


def erf_adaptive_loss(
    logits: Tensor, gt_classes: Tensor, weights: Tensor, cell_regions: Tensor
) -> Tensor:
    """The paper's objective: mean over cells of a region, then over regions, then over images.

    Args:
        logits: float (N, K, h, w).
        gt_classes: int64 (N, S).
        weights: float (S, h, w) of Eq. 2.
        cell_regions: int64 (h, w).

    Returns:
        float scalar.
    """
    return erf_adaptive_region_losses(logits, gt_classes, weights, cell_regions).mean()


def block_wise_loss(logits: Tensor, gt_classes: Tensor, cell_regions: Tensor) -> Tensor:
    """Four region-wise cross-entropies of logits (N, K, h, w); mean over regions, then images."""
    return block_wise_region_losses(logits, gt_classes, cell_regions).mean()


def global_loss(logits: Tensor, gt_classes: Tensor, area_shares: Tensor) -> Tensor:
    """One soft label for the whole image, the four classes weighted by area; mean over images.

    Args:
        area_shares: float (S,), each region's part of the canvas, adding up to 1.
    """
    return combine_global(global_region_losses(logits, gt_classes), area_shares)


def combine_global(region_losses: Tensor, area_shares: Tensor) -> Tensor:
    """Scalar of the global objective from its (N, S) region losses."""
    return (region_losses * area_shares.to(region_losses)).sum(dim=1).mean()


OBJECTIVES = {
    "erf_adaptive": Objective(
        lambda logits, gt_classes, canvas: erf_adaptive_region_losses(
            logits, gt_classes, canvas.erf_weights, canvas.cell_regions, canvas.used
        ),
        needs_erf=True,
    ),
    "block_wise": Objective(
        lambda logits, gt_classes, canvas: block_wise_region_losses(
            logits, gt_classes, canvas.cell_regions, canvas.used
        ),
    ),
    "global": Objective(
        lambda logits, gt_classes, canvas: global_region_losses(logits, gt_classes, canvas.used),
        lambda region_losses, canvas: combine_global(region_losses, canvas.area_shares),
    ),
}


def region_means(values: Tensor, cell_regions: Tensor, used: Tensor | None = None) -> Tensor:
    """Mean over the cells of each region.

    Args:
        values: float (..., h, w).
        cell_regions: int64 (h, w).
        used: bool that broadcasts to ``values``, the cells that count; None = all. The mean over
            none of a region's cells is 0.

    Returns:
        float (..., S).
    """
    # Weighted sums: no data-dependent shapes (a GPU sync), and no matrix product, which TF32 would
    # round to 10 bits.
    cells = values.flatten(-2)
    members = [(cell_regions.flatten() == r).to(values.dtype) for r in range(NUM_REGIONS)]
    if used is not None:
        members = [m * used.flatten(-2) for m in members]
    members = [m / m.sum(dim=-1, keepdim=True).clamp_min(1) for m in members]
    return torch.stack([(cells * m).sum(dim=-1) for m in members], dim=-1)


def region_ranks(region_logits: Tensor, gt_classes: Tensor) -> Tensor:
    """How many other classes score at least as high as the true one, per image and region.

    Args:
        region_logits: float (N, S, K).
        gt_classes: int64 (N, S).

    Returns:
        int64 (N, S) in [0, K): 0 where the true class wins; "top-5 correct" is rank < 5. Ties and
        nan count against the true class, so that a dead network does not look perfect.
    """
    own = region_logits.gather(2, gt_classes[:, :, None])
    return (~(region_logits < own)).sum(dim=2) - 1


def _nll_of_regions(logits: Tensor, gt_classes: Tensor) -> Tensor:
    """-log softmax, read at the four regions' classes only: (N, K, *cells) -> (N, S, *cells)."""
    cells = logits.shape[2:]
    index = gt_classes.reshape(*gt_classes.shape, *(1 for _ in cells))
    return _GatheredNll.apply(logits, index.expand(*gt_classes.shape, *cells))


class _GatheredNll(torch.autograd.Function):
    """logsumexp - logit, at the classes of ``index`` (N, S, *cells); float32 or wider.

    Written out because autograd would hold three tensors of the size of the logits at once; here
    the gradient itself is the only one. Tested against autograd's.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor) -> Tensor:
        total = _widen(logits).logsumexp(dim=1, keepdim=True)
        ctx.save_for_backward(logits, total, index)
        return total - logits.gather(1, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, total, index = ctx.saved_tensors
        result = (logits - total).exp_()  # softmax
        result.mul_(grad.sum(dim=1, keepdim=True)).scatter_add_(1, index, -grad)
        return result.to(logits.dtype), None


def _widen(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _full_precision(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)

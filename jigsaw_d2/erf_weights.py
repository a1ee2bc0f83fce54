"""From the ERF of each cell to the weights of its four labels (Eq. 2), and what to say about them.

Shape letters: S = 4 regions R1..R4; h, w feature cells. Pure tensor arithmetic.
"""

import torch
from torch import Tensor

from jigsaw_d2.errors import JigsawError

NUM_REGIONS = 4


class ErfError(JigsawError, ValueError):
    """A network, feature, input or setting whose ERF cannot be measured."""


def region_weights(region_sums: Tensor, cell_regions: Tensor, tau: float = 0.7) -> Tensor:
    """Eq. 2: the weights of the four labels in every cell.

    Args:
        region_sums: float (h, w, S), non-negative.
        cell_regions: int64 (h, w) in [0, S), r of Eq. 2.
        tau: least weight of the cell's own region, in [0, 1].

    Returns:
        float64 (S, h, w), adding up to 1 in every cell. A cell that sees nothing outside its region
        (share 1) gives its own label weight 1, and so does a cell that sees nothing at all (a dead
        feature vector, 0 / 0 in Eq. 2): it tells nothing about the neighbours.

    Raises:
        ErfError: shapes that do not belong together, negative or non-finite sums, or tau outside
            [0, 1].
    """
    if region_sums.shape != (*cell_regions.shape, NUM_REGIONS):
        raise ErfError(
            f"region sums {tuple(region_sums.shape)} do not fit {tuple(cell_regions.shape)} cells"
        )
    if not 0 <= tau <= 1:
        raise ErfError(f"tau (MODEL.JIGSAW.TAU) is {tau}; it must lie in [0, 1]")
    sums = check_finite(region_sums.double().permute(2, 0, 1))
    if (sums < 0).any():
        raise ErfError("an ERF has negative sums; they are sums of absolute or positive gradients")
    own = own_region_weights(cell_regions)
    outside = (sums * (1 - own)).sum(dim=0)
    # Not 1 - share: that difference loses all digits where nearly everything lies inside.
    own_share = 1 - outside / sums.sum(dim=0).clamp_min(torch.finfo(sums.dtype).tiny)
    own_weight = torch.where(outside > 0, own_share.clamp_min(tau), 1.0)
    others = sums / outside.where(outside > 0, torch.ones_like(outside))
    return torch.where(own > 0, own_weight, (1 - own_weight) * others)


def own_region_weights(cell_regions: Tensor) -> Tensor:
    """Float64 (S, h, w): weight 1 on each cell's own region, the limit tau = 1 of Eq. 2."""
    regions = torch.arange(NUM_REGIONS, device=cell_regions.device)
    return (cell_regions == regions[:, None, None]).double()


def region_shares(region_sums: Tensor, cell_regions: Tensor) -> Tensor:
    """Float64 (S, S): row r = how the ERF of a cell of region r spreads over R1..R4, cell mean.

    A dead cell counts as zeros.
    """
    shares = region_sums.double()
    shares = shares / shares.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.double).tiny)
    return torch.stack([shares[cell_regions == r].mean(dim=0) for r in range(NUM_REGIONS)])


def outside_shares(region_sums: Tensor, cell_regions: Tensor) -> Tensor:
    """Float64 (S,): the part of a cell's ERF outside its own region, mean over a region's cells."""
    shares = region_shares(region_sums, cell_regions)
    return shares.sum(dim=1) - shares.diagonal()


def format_summary(region_sums: Tensor, weights: Tensor, cell_regions: Tensor) -> str:
    """Table of four rows: each region's cells, where their ERF lies, and the labels they learn.

    Args:
        region_sums: float (h, w, S).
        weights: float (S, h, w) in force.
        cell_regions: int64 (h, w).
    """
    shares = region_shares(region_sums, cell_regions)
    outside = outside_shares(region_sums, cell_regions)
    lines = [
        "cells of   ERF share in R1    R2    R3    R4   outside   label weight w1    w2    w3    w4"
    ]
    for r in range(NUM_REGIONS):
        labels = weights[:, cell_regions == r].double().mean(dim=1)
        lines.append(
            f"R{r + 1} ({int((cell_regions == r).sum()):3d})"
            + " " * 10
            + "".join(f"{share:6.3f}" for share in shares[r].tolist())
            + f"{outside[r].item():10.3f}"
            + " " * 12
            + "".join(f"{weight:6.3f}" for weight in labels.tolist())
        )
    return "\n".join(lines)


def check_finite(values: Tensor) -> Tensor:
    """The values, float of any shape (...), themselves.

    Raises:
        ErfError: one of them is inf or nan.
    """
    if not torch.isfinite(values).all():
        raise ErfError(
            "the ERF holds inf or nan: the network's weights have diverged, or float16 overflowed "
            "(MODEL.JIGSAW.ERF.AMP)"
        )
    return values

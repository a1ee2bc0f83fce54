"""ERF of a fine feature at a bounded price: of some cells it is measured, of the rest it follows.

Where a cell sees depends on its row and on its column in much the same way in every column and row,
and not smoothly: a pyramid enlarges coarse features by copying, so its cells move in steps. Probes
on a grid of rows and columns miss the steps; here a regular lattice gives nearly every row and
every column a probe of its own. Of a random ResNet-18's pyramid the weights on p3, of 28x28 cells,
that 49 probes give differ from those of all cells by 0.002 on average and 0.017 at most;
interpolated between 7x7 of them, by 0.004 and 0.048. Of 12x12 cells: by 0.001 and 0.010 random, by
0.002 and 0.018 after a training. In networks of 8 to 32 channels, random or trained, single cells
see otherwise than their row and column: 0.002 to 0.006 on average, 0.02 to 0.08 at most, which no
smoothing of all other cells mended.

Shape letters: h, w feature cells; S = 4 regions R1 top-left, R2 top-right, R3 bottom-left,
R4 bottom-right.
"""

import math

import torch
from torch import Tensor

# The cells of the paper's res5, whose refresh sets the price.
MAX_PROBES = 49
_GOLDEN = (math.sqrt(5) - 1) / 2
# Standard deviations of the smoothing: cells that share a row or column, and the rest in the
# feature's side. Chosen by the error above and of p4.
_ROW_SIGMA, _MAP_SIGMA = 0.3, 0.08


def probe_cells(h: int, w: int) -> list[tuple[int, int]] | None:
    """(row, column) of the cells to measure, at most MAX_PROBES; None where that is every cell."""
    if h * w <= MAX_PROBES:
        return None
    rows = (int((k + 0.5) * h / MAX_PROBES) for k in range(MAX_PROBES))
    columns = (int(k * _GOLDEN % 1 * w) for k in range(MAX_PROBES))
    return sorted(set(zip(rows, columns)))


def fill_between(region_sums: Tensor, cells: list[tuple[int, int]] | None) -> Tensor:
    """Region sums of all cells from those of some.

    The shares above and left of the split are taken from the probes of the same row and column,
    and a smooth map of what these leave; the share of R1 is their product and a smooth correction.

    Args:
        region_sums: float64 (h, w, S), non-negative, right in ``cells`` alone; a probe that is dead
            or not finite tells nothing about other cells.
        cells: of ``probe_cells``; None = all.

    Returns:
        float64 (h, w, S): as given in ``cells``, elsewhere shares times the probes' mean sum.
    """
    if cells is None:
        return region_sums
    h, w = region_sums.shape[:2]
    probed = torch.zeros(h, w, dtype=torch.bool, device=region_sums.device)
    probed[tuple(zip(*cells))] = True
    totals = region_sums.sum(dim=-1)
    known = (probed & totals.isfinite() & (totals > 0)).double()
    if not known.any():
        return region_sums
    shares = region_sums / totals.where(known > 0, 1.0)[..., None]
    r1, r2, r3, _ = shares.where(known[..., None] > 0, 0.0).unbind(dim=-1)
    rows, columns = (_kernel(n, _ROW_SIGMA, known) for n in (h, w))
    tall, wide = (_kernel(n, _MAP_SIGMA * n, known) for n in (h, w))
    flat = [torch.ones_like(kernel) for kernel in (rows, columns)]

    def smooth(values: Tensor, over_rows: Tensor, over_columns: Tensor) -> Tensor:
        """Weighted mean of the known values, float (h, w)."""
        weights = over_rows @ known @ over_columns
        return over_rows @ (values * known) @ over_columns / weights.clamp_min(1e-300)

    top, left = r1 + r2, r1 + r3
    above, beside = smooth(top, rows, flat[1]), smooth(left, flat[0], columns)
    above = above + smooth(top - above, tall, wide)
    beside = beside + smooth(left - beside, tall, wide)
    corner = above * beside + smooth(r1 - top * left, tall, wide)
    parts = (corner, above - corner, beside - corner, 1 - above - beside + corner)
    mean = totals.where(known > 0, 0.0).sum() / known.sum()
    filled = torch.stack(parts, dim=-1).clamp_min(0) * mean
    return torch.where(probed[..., None], region_sums, filled)


def _kernel(count: int, sigma: float, like: Tensor) -> Tensor:
    """Float64 (count, count), symmetric: a Gaussian around each place."""
    place = torch.arange(count, dtype=torch.float64, device=like.device)
    return (-0.5 * ((place[:, None] - place) / sigma) ** 2).exp()

"""How samples fill a template, and the template and scale that suit a store and a detector best.

The paper's template suits COCO under the paper's detector. What it fixes there is kept here as two
ratios, of which everything else follows:

- scale: the paper shows samples at 0.8 to 1.5 times their size (Sec. 4.1), its detector shows COCO
  enlarged by 800 / 480, so pre-training sees objects at 0.48 to 0.9 of the size that the detector
  will see them in;
- room: at that scale the template of 224 pixels cuts away 76 % of the pixels of COCO's samples.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jigsaw_d2.data.samples import GROUPS
from jigsaw_d2.data.template import REGION_GROUPS, REGIONS, JigsawTemplate

PAPER_SCALES = (0.8, 1.5)
PAPER_DETECTOR_SCALE = 800 / 480  # COCO's images are mostly 640 x 480
PAPER_CUT = 0.765  # measured: 0.763 on a COCO photo of each class
MAX_CELLS = 16  # of a canvas side: 512 pixels at stride 32
SCALES = 8  # ratios of the augmentation over which shares are averaged
FIT_SAMPLES = 20_000  # enough of a store to choose by


class Fill(NamedTuple):
    """Of all pixels that a template computes or that its samples have; shares in 0..1."""

    used: float  # canvas pixels that show a sample
    cut: float  # pixels of the resized samples that find no place
    distinct: float  # stored sample pixels shown per canvas pixel


class Fit(NamedTuple):
    """A template with the ratios that its samples are resized by, and what it makes of a store."""

    template: JigsawTemplate
    scale_range: tuple[float, float]
    fill: Fill

    def __str__(self) -> str:
        side, corner, (low, high) = self.template.width, self.template.split_x, self.scale_range
        return (
            f"canvas {side}, split {corner}, scale {low:.2f} to {high:.2f}: {self.fill.used:.0%} "
            f"of the canvas shows samples, {self.fill.cut:.0%} of their pixels are cut away, "
            f"{self.fill.distinct:.2f} stored pixels are shown for each one computed"
        )


def detector_scale(image_size: Sequence[float], min_size: float, max_size: float) -> float:
    """Ratio by which Detectron2's ``ResizeShortestEdge`` enlarges an image of two sides, pixels.

    ``min_size`` 0: it shows images as they are.
    """
    return min(min_size / min(image_size), max_size / max(image_size)) if min_size else 1.0


def fit_scale(scale: float) -> tuple[float, float]:
    """The paper's fraction of a detector's ``scale``, as ratios to resize samples by."""
    low, high = (round(ratio * scale / PAPER_DETECTOR_SCALE, 3) for ratio in PAPER_SCALES)
    return low, high


def paper_fit(sizes: np.ndarray, groups: np.ndarray) -> Fit:
    """What the paper's own template and scale make of samples of ``sizes`` (n, 2), groups (n,)."""
    template = JigsawTemplate()
    return Fit(template, PAPER_SCALES, canvas_fill(sizes, groups, template, PAPER_SCALES))


def fit_template(
    sizes: np.ndarray,
    groups: np.ndarray,
    scale_range: tuple[float, float],
    *,
    stride: int = 32,
    max_side: int = MAX_CELLS * 32,
    size_aware: bool = False,
) -> Fit:
    """The square template that shows most distinct sample pixels for the pixels that it computes.

    Among those that cut away no more than the paper's does of COCO; where none is so roomy, the
    one that cuts away least. Of two that are equal the smaller.

    Args:
        sizes, groups, size_aware: (n, 2), (n,), see ``expected_pixels``.
        scale_range: ratios that samples are resized by.
        stride: of the classified feature; canvas and split are multiples of it.
        max_side: of the canvas, pixels; such as the detector's own image.
    """
    step = -(-len(sizes) // FIT_SAMPLES)
    sizes, groups = sizes[::step], groups[::step]
    found = []
    for cells in range(2, max(2, min(MAX_CELLS, max_side // stride)) + 1):
        for split in range(1, cells // 2 + 1):
            side, corner = cells * stride, split * stride
            template = JigsawTemplate(side, side, corner, corner)
            fill = canvas_fill(sizes, groups, template, scale_range, size_aware)
            found.append(Fit(template, scale_range, fill))
    roomy = [fit for fit in found if fit.fill.cut <= PAPER_CUT]
    if not roomy:
        return min(found, key=lambda fit: fit.fill.cut)
    return max(roomy, key=lambda fit: fit.fill.distinct)


def canvas_fill(
    sizes: np.ndarray,
    groups: np.ndarray,
    template: JigsawTemplate,
    scale_range: Sequence[float],
    size_aware: bool = False,
) -> Fill:
    """Shares over the whole canvas; ``sizes`` (n, 2) and the rest as of ``expected_pixels``."""
    found = expected_pixels(sizes, groups, template, scale_range, size_aware)
    shown, distinct, resized, _ = np.nansum(found, axis=0).tolist()
    pixels = template.height * template.width
    return Fill(shown / pixels, 1 - shown / resized, distinct / pixels)


def template_fill(
    sizes: np.ndarray, groups: np.ndarray, template: JigsawTemplate, scale_range: Sequence[float]
) -> dict:
    """{region: {"used", "padded", "cropped"}}; ``sizes`` (n, 2) as of ``expected_pixels``.

    "used" and "padded" are shares of the region's pixels; "cropped" is the mean share of a sample's
    pixels that find no place. None for a region whose group is empty.
    """
    found = expected_pixels(sizes, groups, template, scale_range)
    fill: dict[str, dict | None] = dict.fromkeys(REGIONS)
    for name, size, (shown, _, _, kept) in zip(REGIONS, template.region_sizes, found.tolist()):
        if not np.isnan(shown):
            used = shown / (size[0] * size[1])
            shares = {"used": used, "padded": 1 - used, "cropped": 1 - kept}
            fill[name] = {key: round(share, 4) for key, share in shares.items()}
    return fill


def expected_pixels(
    sizes: np.ndarray,
    groups: np.ndarray,
    template: JigsawTemplate,
    scale_range: Sequence[float],
    size_aware: bool = False,
) -> np.ndarray:
    """What one image shows in each region, expected over the draws of Jigsaw assembly.

    Of two S samples the smaller goes to R1: a sample's chance to be the larger is its rank by area;
    with ``size_aware`` draws, whether it is in the larger half.

    Args:
        sizes: (n, 2) (height, width), pixels.
        groups: (n,) index into ``samples.GROUPS``.
        scale_range: ratios between which samples are resized.

    Returns:
        float64 (4, 4): a row a region, NaN where its group is empty; pixels of the canvas that show
        a sample, pixels as stored that these show, pixels of the whole resized sample, and the mean
        share of it that is shown.
    """
    low, high = scale_range
    found = np.full((4, 4), np.nan)
    for row, region, group, size in zip(found, REGIONS, REGION_GROUPS, template.region_sizes):
        mine = sizes[groups == GROUPS.index(group)].astype(np.float64)
        if not len(mine):
            continue
        areas = mine.prod(axis=1)
        larger = (np.argsort(np.argsort(areas, kind="stable")) + 0.5) / len(mine)
        if size_aware:
            larger = np.clip(len(mine) * (larger - 0.5) + 0.5, 0, 1)  # an odd one out goes half
        weight = {"R1": 1 - larger, "R4": larger}.get(region, np.ones(len(mine)))
        weight = weight / weight.sum() / SCALES
        row[:] = 0
        for scale in low + (high - low) * (np.arange(SCALES) + 0.5) / SCALES:
            shown, resized = np.minimum(mine * scale, size).prod(axis=1), areas * scale**2
            terms = shown, shown / scale**2, resized, shown / resized
            # Not BLAS's product (@): twice the time, and far more while others keep the cores busy.
            row += [(weight * term).sum() for term in terms]
    return found

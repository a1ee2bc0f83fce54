"""Several classified features, as a pyramid has them: their buffers, and which sample counts where.

Shape letters as in ``losses``; L features (levels), from fine to coarse.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from detectron2.modeling.poolers import assign_boxes_to_levels
from detectron2.structures import Boxes
from torch import Tensor

from jigsaw_d2.data.template import JigsawTemplate
from jigsaw_d2.io import ConfigError

ASSIGNMENTS = ("all", "assign")
# Of Detectron2's RoI pooler: the level to which a box of canonical size goes, p4.
CANONICAL_LEVEL = 4


class Level(NamedTuple):
    """The buffers of a classified feature.

    cell_regions: int64 (h, w). erf_weights: float32 (S, h, w), w_1..w_4 of Eq. 2 in force; before
    the first refresh they lie wholly on each cell's own region. erf_region_sums: float64
    (h, w, S), what they were computed from; zero before the first refresh.
    """

    cell_regions: Tensor
    erf_weights: Tensor
    erf_region_sums: Tensor


def assigned_levels(boxes: Tensor, strides: Mapping[str, int], box_size: float) -> Tensor:
    """The level to which Detectron2's RoI pooler sends each box.

    Args:
        boxes: int or float (N, S, 4), XYXY canvas pixels.
        strides: of the features, from fine to coarse.
        box_size: side in pixels of a box for stride 16.

    Returns:
        int64 (N, S) in [0, L).
    """
    ends = [int(math.log2(f(strides.values()))) for f in (min, max)]
    flat = [Boxes(boxes.flatten(0, 1))]
    return assign_boxes_to_levels(flat, *ends, box_size, CANONICAL_LEVEL).view(boxes.shape[:2])


def used_cells(boxes: Tensor, cells: Sequence[int], template: JigsawTemplate) -> Tensor:
    """Bool (N, h, w): the cells on whose pixels a sample is shown; the others are padding alone.

    Args:
        boxes: int (N, S, 4), XYXY canvas pixels that show samples.
        cells: (h, w) of the feature.
    """
    spans = []
    for count, size, low in zip(cells, (template.height, template.width), (1, 0)):
        start = torch.arange(count, device=boxes.device) * (size // count)
        first, last = boxes[..., low, None], boxes[..., low + 2, None]  # (N, S, 1)
        spans.append((first < start + size // count) & (last > start))
    return (spans[0][..., :, None] & spans[1][..., None, :]).any(dim=1)


def check_levels(
    assignment: str, strides: Mapping[str, int], box_size: float, template: JigsawTemplate
) -> None:
    """Refuse a way to share out the samples of which a feature would get none.

    Raises:
        ConfigError: naming the key, and for a box size the largest that serves.
    """
    if assignment not in ASSIGNMENTS:
        raise ConfigError(
            f"MODEL.JIGSAW.LEVELS is {assignment!r}; choose one of {', '.join(ASSIGNMENTS)}"
        )
    if assignment == "all":
        return
    if any(stride != 2**k * min(strides.values()) for k, stride in enumerate(strides.values())):
        raise ConfigError(
            f"MODEL.JIGSAW.LEVELS assign needs features of strides that double, not {strides}"
        )
    largest = max(math.sqrt(height * width) for height, width in template.region_sizes)
    coarsest = max(strides, key=strides.__getitem__)
    most = largest / 2 ** (math.log2(strides[coarsest]) - CANONICAL_LEVEL)
    if not 0 < box_size <= most:
        raise ConfigError(
            f"MODEL.JIGSAW.ASSIGN_BOX_SIZE is {box_size}: the largest region shows boxes of "
            f"{largest:.0f} pixels, so no sample would go to {coarsest}; set it to at most "
            f"{math.floor(most)}, or leave {coarsest} out of IN_FEATURES"
        )

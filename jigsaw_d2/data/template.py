"""The Jigsaw template: where the four samples of an image lie, in pixels and in feature cells.

Shape letters used in the whole input pipeline: N images, S = 4 regions, H, W canvas pixels,
h, w feature cells (H / stride, W / stride). Regions are always in the order R1 top-left,
R2 top-right, R3 bottom-left, R4 bottom-right (Fig. 4b).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from jigsaw_d2.io import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

REGIONS = ("R1", "R2", "R3", "R4")
# Shape group shown by each region (Sec. 3.2): square, wide, tall, square.
REGION_GROUPS = ("S", "W", "T", "S")


@dataclass(frozen=True)
class JigsawTemplate:
    """Four rectangles that tile the canvas; hashable, so it can be a key and a config value.

    Attributes:
        height, width: canvas size H, W in pixels; Fig. 4b: 224 x 224.
        split_y, split_x: first row of the lower, first column of the right regions, in pixels.
    """

    height: int = 224
    width: int = 224
    split_y: int = 64
    split_x: int = 64

    def __post_init__(self) -> None:
        splits = {"split_y": (self.split_y, self.height), "split_x": (self.split_x, self.width)}
        for name, (split, size) in splits.items():
            if not 0 < split < size:
                raise ConfigError(
                    f"template {name} = {split} leaves an empty region: it must lie strictly "
                    f"between 0 and {size} (INPUT.JIGSAW.TEMPLATE_SPLIT, TEMPLATE_SIZE)"
                )

    @cached_property
    def boxes(self) -> np.ndarray:
        """int64 (4, 4) regions as XYXY half-open boxes in canvas pixels, read-only."""
        y, x, height, width = self.split_y, self.split_x, self.height, self.width
        boxes = np.array(
            [[0, 0, x, y], [x, 0, width, y], [0, y, x, height], [x, y, width, height]], np.int64
        )
        boxes.flags.writeable = False
        return boxes

    @cached_property
    def region_sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of the four regions in canvas pixels."""
        return tuple((int(y1 - y0), int(x1 - x0)) for x0, y0, x1, y1 in self.boxes)

    def cell_regions(self, stride: int) -> "Tensor":
        """Region 0..3 (= R1..R4) of each feature cell, int64 (h, w).

        Args:
            stride: canvas pixels per cell of the classified feature, e.g. 32 for res5.

        Raises:
            ConfigError: a region would not cover whole cells; names the key, its value and the
                multiple of ``stride`` below and above it.
        """
        from torch import from_numpy  # here alone: extraction does without torch

        for key, value in (
            ("TEMPLATE_SIZE (height)", self.height),
            ("TEMPLATE_SIZE (width)", self.width),
            ("TEMPLATE_SPLIT (y)", self.split_y),
            ("TEMPLATE_SPLIT (x)", self.split_x),
        ):
            if value % stride:
                below = value // stride * stride
                choices = " or ".join(str(v) for v in (below, below + stride) if v > 0)
                raise ConfigError(
                    f"INPUT.JIGSAW.{key} = {value} is not a multiple of the feature's stride "
                    f"{stride}: use {choices}, or another MODEL.JIGSAW.IN_FEATURE"
                )
        lower = np.arange(0, self.height, stride) >= self.split_y
        right = np.arange(0, self.width, stride) >= self.split_x
        return from_numpy(2 * lower[:, None].astype(np.int64) + right)

    def area_shares(self) -> np.ndarray:
        """float64 (4,), each region's part of the canvas; Fig. 4b: 8.2, 20.4, 20.4, 51.0 %."""
        heights, widths = np.array(self.region_sizes, np.float64).T
        return heights * widths / (self.height * self.width)

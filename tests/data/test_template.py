"""The template in pixels and cells, against numbers derived by hand from Fig. 4b."""

import numpy as np
import pytest
import torch

from jigsaw_d2.data.template import JigsawTemplate
from jigsaw_d2.io import ConfigError


def test_default_boxes_are_those_of_figure_4b():
    boxes = JigsawTemplate().boxes
    assert boxes.tolist() == [
        [0, 0, 64, 64],
        [64, 0, 224, 64],
        [0, 64, 64, 224],
        [64, 64, 224, 224],
    ]
    assert boxes.dtype == np.int64


def test_default_cells_are_2x2_2x5_5x2_5x5():
    cells = JigsawTemplate().cell_regions(32)
    assert cells.shape == (7, 7) and cells.dtype == torch.int64
    assert torch.bincount(cells.flatten()).tolist() == [4, 10, 10, 25]
    assert cells[0].tolist() == [0, 0, 1, 1, 1, 1, 1]
    assert cells[6].tolist() == [2, 2, 3, 3, 3, 3, 3]


def test_area_shares():
    # 64*64, 64*160, 160*64, 160*160 of 224*224 = 50176
    shares = JigsawTemplate().area_shares()
    assert shares == pytest.approx([4096 / 50176, 10240 / 50176, 10240 / 50176, 25600 / 50176])
    assert shares.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("size, split", [((320, 320), (96, 96)), ((448, 320), (128, 160))])
def test_other_templates_tile_canvas_and_cells(size, split):
    template = JigsawTemplate(*size, *split)
    covered = np.zeros(size, np.int64)
    for region, (x0, y0, x1, y1) in enumerate(template.boxes):
        covered[y0:y1, x0:x1] += 1
        cells = template.cell_regions(32)[y0 // 32 : y1 // 32, x0 // 32 : x1 // 32]
        assert (cells == region).all()
    assert (covered == 1).all()


def test_hashable_equal_and_frozen():
    assert hash(JigsawTemplate()) == hash(JigsawTemplate(224, 224, 64, 64))
    with pytest.raises(ValueError):
        JigsawTemplate().boxes[0, 0] = 1


@pytest.mark.parametrize(
    "template, words",
    [
        (JigsawTemplate(230, 224), ["TEMPLATE_SIZE", "height", "230", "32", "224 or 256"]),
        (JigsawTemplate(224, 224, 64, 72), ["TEMPLATE_SPLIT", "(x)", "72", "64 or 96"]),
        (JigsawTemplate(224, 224, 16, 64), ["TEMPLATE_SPLIT", "(y)", "16", "use 32,"]),
    ],
)
def test_off_stride_names_key_value_and_stride(template, words):
    with pytest.raises(ConfigError) as error:
        template.cell_regions(32)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("split", [0, 224, -32, 300])
def test_empty_region_is_refused(split):
    with pytest.raises(ConfigError, match="TEMPLATE_SPLIT"):
        JigsawTemplate(split_x=split)

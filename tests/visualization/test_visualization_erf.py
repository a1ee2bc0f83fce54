"""``visualize.py erf`` and its figures: one colour scale, right numbers, readable pixels."""

import json

import numpy as np
import pytest
import torch
from detectron2.modeling import build_backbone
from helpers_figures import run_figure
from helpers_networks import TINY_RESNET, tiny_backbone
from helpers_store import make_store

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.data.template import JigsawTemplate
from jigsaw_d2.modeling.erf import erf_region_sums, outside_shares
from jigsaw_d2.visualization.erf import cell_figure, erf_figure, map_size
from jigsaw_d2.visualization.figures import figure_pixels

CANVAS = JigsawTemplate(96, 96, 32, 32)
TINY = [*map(str, TINY_RESNET), "MODEL.RESNETS.OUT_FEATURES", "['res5']"]


def test_one_scale_and_a_mean_of_one_in_every_panel():
    maps = [torch.rand(4, 96, 96), 1e6 * torch.rand(4, 96, 96) ** 4]
    figure = erf_figure(["a", "b"], maps, [torch.eye(4)] * 2, CANVAS)
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(images) == 8 and len({image.norm.vmax for image in images}) == 1
    for image in images:
        assert float(np.mean(image.get_array())) == pytest.approx(1, abs=1e-5)


def test_a_dead_network_is_drawn():
    figure = erf_figure(["dead"], [torch.zeros(4, 96, 96)], [torch.zeros(4, 4)], CANVAS)
    pixels = figure_pixels(figure)
    assert (pixels.dtype, pixels.shape[0], pixels.ndim) == (np.uint8, 3, 3)
    figure_pixels(cell_figure(torch.zeros(1, 32, 32), [(0, 0)], 16))


def test_sizes_by_hand():
    spots = torch.zeros(21, 21)
    spots[10, 10] = 1
    assert map_size(spots) == {"radius_50": 0.0, "radius_90": 0.0, "side_luo": 1.0}
    spots[10, 5] = spots[10, 15] = 0.5  # half the mass five pixels away
    spots[0, 0] = spots[20, 20] = 1e-4  # below 4.55 % of the peak
    assert map_size(spots)["radius_90"] == 5.0
    assert map_size(spots)["side_luo"] == pytest.approx(3**0.5)
    assert map_size(torch.zeros(5, 5))["radius_50"] == 0.0


def visualize(folder, *arguments, opts=()):
    """Exit status, what was printed, and the rows of the numbers beside the figure."""
    command = ["--config-file", "Base-JigsawPretrain.yaml", "--device", "cpu"]
    command += ["--output", str(folder / "figures" / "erf.png"), *map(str, arguments)]
    status, out = run_figure("erf", [*command, "--opts", *TINY, *opts])
    numbers = folder / "figures" / "erf.json"
    return status, out, json.loads(numbers.read_text())["networks"] if status == 0 else []


def test_checkpoint_beside_random_network_on_jigsaw_images(tmp_path):
    make_store(tmp_path / "store", n_per_group=4)
    weights = tmp_path / "model_final.pth"
    state = {f"backbone.{k}": v for k, v in tiny_backbone(seed=4).state_dict().items()}
    torch.save({"model": state}, weights)
    networks = ["--weights", weights, "random", "--names", "ours", "random"]
    images = ["--store", tmp_path / "store", "--num-images", 1]
    status, out, rows = visualize(tmp_path, *networks, *images)
    assert status == 0 and (tmp_path / "figures" / "erf.png").is_file(), out
    assert [row["name"] for row in rows] == ["ours", "random"]
    assert rows[0]["outside"] != rows[1]["outside"]


def test_numbers_are_those_of_the_network(tmp_path):
    status, out, (row,) = visualize(tmp_path, "--num-images", 1, "--seed", 3)
    assert status == 0, out
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(3))
    with torch.random.fork_rng():  # as load_network draws it
        torch.manual_seed(3)
        backbone = build_backbone(get_jigsaw_cfg("Base-JigsawPretrain.yaml", TINY))
    sums = erf_region_sums(backbone, images, JigsawTemplate())
    expected = outside_shares(sums, JigsawTemplate().cell_regions(32))
    np.testing.assert_allclose(row["outside"], expected, rtol=1e-5)


def test_lists_of_different_length(tmp_path):
    status, out, _ = visualize(tmp_path, "--weights", "random", "random", "--names", "one")
    assert status == 2 and "do not go together" in out


def test_a_row_for_each_classified_feature(tmp_path):
    """The pyramid of a pre-training config, by level; its fine levels are probed."""
    pyramid = ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.FPN.OUT_CHANNELS", "4"]
    pyramid += ["MODEL.RESNETS.OUT_FEATURES", "['res4', 'res5']"]
    pyramid += ["MODEL.FPN.IN_FEATURES", "['res4', 'res5']"]
    pyramid += ["INPUT.JIGSAW.TEMPLATE_SIZE", "[128, 128]"]
    levels = ["MODEL.JIGSAW.IN_FEATURES", "['p4', 'p5']"]
    status, out, rows = visualize(tmp_path, "--num-images", 1, opts=[*pyramid, *levels])
    assert status == 0, out
    assert [row["name"] for row in rows] == ["random p4", "random p5"]
    assert [row["feature"] for row in rows] == ["p4", "p5"]
    assert rows[0]["outside"] != rows[1]["outside"]

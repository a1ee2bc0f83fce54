"""``visualize.py erf`` and its figures: one colour scale, right numbers, readable pixels."""

import json
import tempfile
import unittest
from pathlib import Path

import numpy as np
import torch
from detectron2.modeling import build_backbone
from helpers_figures import run_figure
from helpers_networks import TINY_RESNET, tiny_backbone
from helpers_store import make_store

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.data.template import JigsawTemplate
from jigsaw_d2.modeling.erf import erf_region_sums, outside_shares
from jigsaw_d2.visualization.erf import cell_figure, erf_figure, figure_pixels, map_size

CANVAS = JigsawTemplate(96, 96, 32, 32)
TINY = [*map(str, TINY_RESNET), "MODEL.RESNETS.OUT_FEATURES", "['res5']"]


class FigureTest(unittest.TestCase):
    def test_one_scale_and_a_mean_of_one_in_every_panel(self):
        maps = [torch.rand(4, 96, 96), 1e6 * torch.rand(4, 96, 96) ** 4]
        figure = erf_figure(["a", "b"], maps, [torch.eye(4)] * 2, CANVAS)
        images = [axes.images[0] for axes in figure.axes if axes.images]
        self.assertEqual(len(images), 8)
        self.assertEqual(len({image.norm.vmax for image in images}), 1)
        for image in images:
            self.assertAlmostEqual(float(np.mean(image.get_array())), 1.0, places=5)

    def test_dead_network_is_drawn(self):
        figure = erf_figure(["dead"], [torch.zeros(4, 96, 96)], [torch.zeros(4, 4)], CANVAS)
        pixels = figure_pixels(figure)
        self.assertEqual((pixels.dtype, pixels.shape[0], pixels.ndim), (np.uint8, 3, 3))
        figure_pixels(cell_figure(torch.zeros(1, 32, 32), [(0, 0)], 16))

    def test_sizes_by_hand(self):
        spots = torch.zeros(21, 21)
        spots[10, 10] = 1
        self.assertEqual(map_size(spots), {"radius_50": 0.0, "radius_90": 0.0, "side_luo": 1.0})
        spots[10, 5] = spots[10, 15] = 0.5  # half the mass five pixels away
        spots[0, 0] = spots[20, 20] = 1e-4  # below 4.55 % of the peak
        self.assertEqual(map_size(spots)["radius_90"], 5.0)
        self.assertAlmostEqual(map_size(spots)["side_luo"], 3**0.5)
        self.assertEqual(map_size(torch.zeros(5, 5))["radius_50"], 0.0)


class CommandTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.output = self.folder / "figures" / "erf.png"

    def visualize(self, *arguments):
        command = ["--config-file", "Base-JigsawPretrain.yaml", "--device", "cpu"]
        return run_figure(
            "erf", [*command, "--output", str(self.output), *arguments, "--opts", *TINY]
        )

    def test_checkpoint_beside_random_network_on_jigsaw_images(self):
        make_store(self.folder / "store", n_per_group=4)
        trained = tiny_backbone(seed=4)
        weights = self.folder / "model_final.pth"
        torch.save(
            {"model": {f"backbone.{k}": v for k, v in trained.state_dict().items()}}, weights
        )
        status, out = self.visualize(
            *("--weights", str(weights), "random", "--names", "ours", "random"),
            *("--store", str(self.folder / "store"), "--num-images", "1"),
        )
        self.assertEqual(status, 0, out)
        self.assertTrue(self.output.is_file())
        rows = json.loads(self.output.with_suffix(".json").read_text())["networks"]
        self.assertEqual([row["name"] for row in rows], ["ours", "random"])
        self.assertNotEqual(rows[0]["outside"], rows[1]["outside"])

    def test_numbers_are_those_of_the_network(self):
        status, out = self.visualize("--num-images", "1", "--seed", "3")
        self.assertEqual(status, 0, out)
        (row,) = json.loads(self.output.with_suffix(".json").read_text())["networks"]
        template = JigsawTemplate()
        images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(3))
        with torch.random.fork_rng():  # as load_network draws it
            torch.manual_seed(3)
            backbone = build_backbone(get_jigsaw_cfg("Base-JigsawPretrain.yaml", TINY))
        sums = erf_region_sums(backbone, images, template)
        expected = outside_shares(sums, template.cell_regions(32))
        np.testing.assert_allclose(row["outside"], expected, rtol=1e-5)

    def test_lists_of_different_length(self):
        status, out = self.visualize("--weights", "random", "random", "--names", "one")
        self.assertEqual(status, 2)
        self.assertIn("do not go together", out)


if __name__ == "__main__":
    unittest.main()

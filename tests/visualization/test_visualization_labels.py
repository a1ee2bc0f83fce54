"""``visualize.py labels``: weights and losses of one image, cell by cell."""

import tempfile
import unittest
from pathlib import Path

import torch
from detectron2.modeling import build_model
from helpers_figures import run_figure
from helpers_networks import TINY_RESNET
from helpers_store import make_store

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.modeling.erf import region_weights
from jigsaw_d2.modeling.losses import erf_adaptive_loss, region_means
from jigsaw_d2.visualization.inputs import normalise, rgb_stream
from jigsaw_d2.visualization.labels import cell_losses, labels_figure, load_pretrainer

CONFIG = "Base-JigsawPretrain.yaml"
TINY = [*map(str, TINY_RESNET), "MODEL.RESNETS.OUT_FEATURES", "['res5']"]


class LabelsTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        make_store(self.folder / "store", n_per_group=4, classes=3)
        self.cfg = get_jigsaw_cfg(CONFIG, [*TINY, "MODEL.JIGSAW.NUM_CLASSES", "3"])
        self.model = build_model(self.cfg).eval()
        weights = region_weights(torch.rand(7, 7, 4), self.model.cell_regions)
        self.model.erf_weights.copy_(weights)
        self.weights = str(self.folder / "model_final.pth")
        torch.save({"model": self.model.state_dict()}, self.weights)

    def visualize(self, *arguments, weights=None, store=None):
        command = ["--config-file", CONFIG, "--weights", weights or self.weights]
        command += ["--store", str(store or self.folder / "store"), "--device", "cpu"]
        command += ["--output", str(self.folder / "labels.png"), *arguments, "--opts", *TINY]
        return run_figure("labels", command)

    def test_files(self):
        status, out = self.visualize("--position", "3", "8")
        self.assertEqual(status, 0, out)
        names = [Path(line).name for line in out.splitlines() if line.endswith(".png")]
        self.assertEqual(names, ["labels-3.png", "labels-8.png"])

    def test_loss_map_averages_to_the_loss(self):
        model, cfg = load_pretrainer(CONFIG, self.weights, TINY)
        batch = rgb_stream(cfg, [str(self.folder / "store")])[range(1)]
        images = normalise(batch["image"], cfg)
        losses = cell_losses(model, images, batch["gt_classes"][0])
        regions = model.cell_regions
        with torch.no_grad():
            logits = model.cell_logits(images)
            expected = erf_adaptive_loss(logits, batch["gt_classes"], model.erf_weights, regions)
        torch.testing.assert_close(region_means(losses, regions).mean(), expected)

    def test_figure_shows_each_weight_on_one_scale(self):
        model = self.model
        image = torch.zeros(3, 224, 224, dtype=torch.uint8)
        figure = labels_figure(
            image, ["a", "b", "c", "d"], model.erf_weights, torch.ones(7, 7), model.cell_regions,
            model.template,
        )  # fmt: skip
        drawn = [axes.images[0] for axes in figure.axes if axes.images][1:5]
        for r, panel in enumerate(drawn):
            self.assertEqual((panel.norm.vmin, panel.norm.vmax), (0, 1))
            self.assertEqual(panel.get_array().tolist(), model.erf_weights[r].tolist())

    def test_mistakes_in_one_line(self):
        backbone = str(self.folder / "backbone.pth")
        torch.save({"model": self.model.backbone.state_dict()}, backbone)
        make_store(self.folder / "other", n_per_group=2, classes=5)
        for options, message in (
            ({"weights": backbone}, "need its classifier"),
            ({"weights": backbone[:-1]}, "no such file"),
            ({"store": self.folder / "other"}, "knows 3 classes"),
        ):
            status, out = self.visualize(**options)
            self.assertEqual(status, 2)
            self.assertIn(message, out)


if __name__ == "__main__":
    unittest.main()

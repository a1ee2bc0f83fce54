"""``python -m jigsaw_d2 erf``: any Detectron2 config, noise or images; files and words."""

import contextlib
import io
import json
import tempfile
import unittest
from pathlib import Path

import cv2
import numpy as np
import torch
from helpers_networks import TINY_RESNET, tiny_fpn

from jigsaw_d2.__main__ import main
from jigsaw_d2.modeling.erf import erf_maps
from jigsaw_d2.visualization.inputs import random_images

ZOO = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
TINY = [*map(str, TINY_RESNET), "MODEL.FPN.OUT_CHANNELS", "8"]


class ErfCommandTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def run_command(self, *arguments):
        out, err = io.StringIO(), io.StringIO()
        command = ["erf", "--config-file", ZOO, "--device", "cpu", "--output", str(self.folder)]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([*command, *arguments, "--opts", *TINY])
        return status, out.getvalue(), err.getvalue()

    def test_pyramid_of_the_zoo_on_noise(self):
        weights = self.folder / "detector.pth"
        network = tiny_fpn(seed=3)
        tensors = {f"backbone.{k}": v for k, v in network.state_dict().items()}
        torch.save({"model": tensors}, weights)
        options = ["--feature", "p4", "--size", "64", "96", "--num-images", "2"]
        status, out, _ = self.run_command(*options, "--weights", str(weights), "--save-maps")
        self.assertEqual(status, 0)
        self.assertIn("absolute value", out)
        self.assertIn("p4: 4x6 cells, stride 16", out)
        report = json.loads((self.folder / "erf.json").read_text())
        self.assertEqual(report["input"], "standard normal noise")
        self.assertEqual(len(report["cells"]), 9)
        self.assertTrue((self.folder / "erf.png").stat().st_size > 10_000)
        maps = np.load(self.folder / "erf.npz")
        self.assertEqual(maps["cells"].tolist()[4], [2, 3])
        expected = erf_maps(network, random_images(2, (64, 96)), [(2, 3)], "p4")
        np.testing.assert_allclose(maps["maps"][4], expected[0], rtol=1e-4, atol=1e-7)

    def test_real_images_and_one_cell(self):
        rng = np.random.default_rng(0)
        for name in ("a.jpg", "b.jpg"):
            cv2.imwrite(str(self.folder / name), rng.integers(0, 256, (50, 70, 3), np.uint8))
        options = ["--feature", "p5", "--size", "64", "64", "--cells", "centre", "--grad", "relu"]
        status, out, _ = self.run_command(*options, "--images", str(self.folder), "--seed", "1")
        self.assertEqual(status, 0)
        self.assertIn("positive part", out)
        self.assertIn("averaged over 2 image(s)", out)
        self.assertEqual(len(json.loads((self.folder / "erf.json").read_text())["cells"]), 1)

    def test_mistakes_in_one_line(self):
        for options, message in (
            (["--feature", "p9"], "p2, p3, p4, p5, p6"),
            (["--feature", "p4", "--size", "50", "64"], "multiples of 32"),
            (["--feature", "p4", "--num-images", "0"], "must be positive"),
            (["--feature", "p4", "--weights", "nowhere.pth"], "nowhere.pth"),
        ):
            status, _, err = self.run_command(*options)
            self.assertEqual(status, 2)
            self.assertIn(message, err)
            self.assertEqual(err.count("\n"), 1)


if __name__ == "__main__":
    unittest.main()

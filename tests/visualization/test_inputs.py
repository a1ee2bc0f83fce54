"""Networks and images for the ERF commands: any config, photos, Jigsaw images."""

import tempfile
import unittest
from pathlib import Path

import cv2
import numpy as np
import torch
from helpers_networks import TINY_RESNET
from helpers_store import make_store
from helpers_weights import THIN, convert

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.io import ConfigError
from jigsaw_d2.visualization import inputs as erf_inputs

ZOO_FPN = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
ZOO_C4 = "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml"
TINY = [*TINY_RESNET, "MODEL.FPN.OUT_CHANNELS", 8]


class NetworkTest(unittest.TestCase):
    def load(self, config, feature, **options):
        return erf_inputs.load_network(config, feature, overrides=TINY, device="cpu", **options)

    def test_zoo_configs(self):
        network, cfg = self.load(ZOO_FPN, "p4")
        self.assertEqual(network.output_shape()["p4"].stride, 16)
        self.assertFalse(network.training)
        self.assertEqual(cfg.INPUT.FORMAT, "BGR")
        network, _ = self.load(ZOO_C4, "res5")  # which C4 keeps outside its backbone
        self.assertEqual(set(network.output_shape()), {"res4", "res5"})

    def test_seed_decides_random_weights(self):
        state = torch.get_rng_state()
        first, same = (self.load(ZOO_C4, "res4")[0].state_dict() for _ in range(2))
        other = self.load(ZOO_C4, "res4", seed=1)[0].state_dict()
        self.assertTrue(torch.equal(torch.get_rng_state(), state))
        name = "res4.0.conv1.weight"
        self.assertTrue(torch.equal(first[name], same[name]))
        self.assertFalse(torch.equal(first[name], other[name]))

    def test_unknown_feature(self):
        with self.assertRaisesRegex(ConfigError, "p2, p3, p4, p5, p6, no 'p9'"):
            self.load(ZOO_FPN, "p9")

    def test_weights_bring_what_they_require(self):
        """A zoo config is written for MSRA's weights: our weights change input, stride and norm."""
        with tempfile.TemporaryDirectory() as folder:
            weights = str(convert(Path(folder), *THIN))
            network, cfg = erf_inputs.load_network(
                ZOO_FPN, "p4", weights, [*THIN, "MODEL.FPN.OUT_CHANNELS", "8"], device="cpu"
            )
            self.assertEqual(cfg.INPUT.FORMAT, "RGB")
            self.assertEqual(cfg.MODEL.PIXEL_STD, [58.395, 57.12, 57.375])
            self.assertEqual(network.bottom_up.res3[0].conv1.stride, (1, 1))
            with self.assertRaisesRegex(ConfigError, "INPUT.FORMAT: config BGR, weights RGB"):
                erf_inputs.load_network(ZOO_FPN, "p4", weights, [*THIN, "INPUT.FORMAT", "BGR"])


class ImagesTest(unittest.TestCase):
    def test_normalise_follows_the_config(self):
        images = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
        images[:, 0] = 200  # red
        cfg = get_jigsaw_cfg("Base-JigsawPretrain.yaml")
        self.assertAlmostEqual(
            erf_inputs.normalise(images, cfg)[0, 0, 0, 0].item(), (200 - 123.675) / 58.395, places=5
        )
        cfg = get_jigsaw_cfg()  # Detectron2's own: BGR, mean 103.53, 116.28, 123.675, std 1
        self.assertAlmostEqual(
            erf_inputs.normalise(images, cfg)[0, 2, 0, 0].item(), 200 - 123.675, places=3
        )

    def test_photos_cover_the_size(self):
        with tempfile.TemporaryDirectory() as folder:
            for name, shape in (("a.png", (40, 100)), ("b.png", (10, 8))):
                image = np.zeros((*shape, 3), np.uint8)
                image[..., 2] = 250  # red, as OpenCV writes
                image[:, : shape[1] // 4] = 0
                cv2.imwrite(f"{folder}/{name}", image)
            Path(folder, "notes.txt").write_text("no image")
            images = erf_inputs.read_images([folder], (32, 32), limit=5)
            self.assertEqual((images.shape, images.dtype), ((2, 3, 32, 32), torch.uint8))
            self.assertTrue((images[0, 0] > 240).all())  # RGB; the crop is the centre
            self.assertEqual(len(erf_inputs.read_images([folder], (32, 32), limit=1)), 1)
            with self.assertRaisesRegex(ConfigError, "notes.txt cannot be read"):
                erf_inputs.read_images([f"{folder}/notes.txt"], (32, 32), limit=1)
            empty = Path(folder, "empty")
            empty.mkdir()
            with self.assertRaisesRegex(ConfigError, "no images in .*empty"):
                erf_inputs.read_images([str(empty)], (32, 32), limit=1)

    def test_streams_of_jigsaw_images(self):
        with tempfile.TemporaryDirectory() as folder:
            store = make_store(f"{folder}/store", n_per_group=4)
            cfg = get_jigsaw_cfg("Base-JigsawPretrain.yaml", ["SEED", 5, "INPUT.FORMAT", "BGR"])
            stream = erf_inputs.jigsaw_stream(cfg, store)
            batch = stream[range(7, 12, 2)]
            self.assertEqual(batch["image"].shape, (3, 3, 224, 224))
            again = erf_inputs.jigsaw_stream(cfg, store)[range(9, 10)]  # a function of position
            self.assertTrue(torch.equal(again["image"][0], batch["image"][1]))
            rgb = erf_inputs.rgb_stream(cfg, [f"{folder}/store"], seed=5)[range(9, 10)]
            self.assertTrue(torch.equal(rgb["image"][0].flip(0), batch["image"][1]))


if __name__ == "__main__":
    unittest.main()

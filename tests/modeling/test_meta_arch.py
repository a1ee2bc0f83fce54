"""JigsawPretrainer: batches in, losses or region scores out; metrics; buffers; refusals."""

import unittest

import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from helpers_networks import TINY_RESNET, Named, tiny_backbone
from torch import nn
from torch.nn import functional as F

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.data.template import JigsawTemplate
from jigsaw_d2.io import ConfigError
from jigsaw_d2.modeling import losses
from jigsaw_d2.modeling.erf import own_region_weights
from jigsaw_d2.modeling.losses import OBJECTIVES
from jigsaw_d2.modeling.meta_arch import LOG_PERIOD, JigsawPretrainer

TINY = JigsawTemplate(height=96, width=96, split_y=32, split_x=32)
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


def build(objective="erf_adaptive", classes=6, backbone=None, **options):
    torch.manual_seed(0)
    settings = dict(
        backbone=backbone or tiny_backbone(),
        in_features=["res5"],
        num_classes=classes,
        template=TINY,
        objective=objective,
        pixel_mean=MEAN,
        pixel_std=STD,
    )
    return JigsawPretrainer(**{**settings, **options})


def batch(n=3, classes=6, size=96):
    rng = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=rng)
    return {"image": images, "gt_classes": torch.randint(0, classes + 1, (n, 4), generator=rng)}


class ForwardTest(unittest.TestCase):
    def test_loss_is_that_of_the_objective(self):
        data = batch()
        for objective in ("erf_adaptive", "block_wise", "global"):
            model = build(objective).eval()  # so that both forward passes are the same
            logits = model.cell_logits(model.preprocess(data["image"]))["res5"]
            regions, classes = TINY.cell_regions(32), data["gt_classes"]
            expected = {
                "erf_adaptive": lambda: losses.erf_adaptive_loss(
                    logits, classes, own_region_weights(regions).float(), regions
                ),
                "block_wise": lambda: losses.block_wise_loss(logits, classes, regions),
                "global": lambda: losses.global_loss(
                    logits, classes, torch.tensor([1.0, 2.0, 2.0, 4.0]) / 9
                ),
            }[objective]()
            model.training = True  # its norms stay in evaluation mode
            out = model(data)
            self.assertEqual(list(out), ["loss_jigsaw"])
            torch.testing.assert_close(out["loss_jigsaw"], expected)

    def test_both_forms_of_batch_are_one(self):
        model, data = build().eval(), batch()
        records = [
            {"image": image, "gt_classes": classes.numpy()}
            for image, classes in zip(data["image"], data["gt_classes"])
        ]
        expected = model(data)["region_logits"]
        self.assertTrue(torch.equal(model(records)["region_logits"], expected))
        bare = [{"image": image} for image in data["image"]]  # no classes are needed to evaluate
        self.assertTrue(torch.equal(model(bare)["region_logits"], expected))
        self.assertEqual(model.train()(records)["loss_jigsaw"].shape, ())

    def test_region_logits_are_means_over_cells(self):
        model, data = build().eval(), batch()
        with torch.no_grad():
            logits = model.cell_logits(model.preprocess(data["image"]))["res5"]
            found = model(data)["region_logits"]
        self.assertEqual(found.shape, (3, 4, 7))
        torch.testing.assert_close(found[:, 3], logits[:, :, 1:, 1:].mean(dim=(2, 3)))
        torch.testing.assert_close(found[:, 1], logits[:, :, 0, 1:].mean(dim=2))

    def test_padding_is_normalised_after_the_stitching(self):
        pixels = build().preprocess(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
        expected = -torch.tensor(MEAN) / torch.tensor(STD)
        torch.testing.assert_close(pixels[0, :, 0, 0], expected)

    def test_every_parameter_learns(self):
        for objective in OBJECTIVES:
            model = build(objective)
            model(batch())["loss_jigsaw"].backward()
            for name, parameter in model.named_parameters():
                self.assertIsNotNone(parameter.grad, f"{objective}: {name}")

    def test_amp_loss_is_float32_and_close(self):
        model, data = build(channels_last=True).eval(), batch()
        model.training = True
        expected = model(data)["loss_jigsaw"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model(data)["loss_jigsaw"]
        self.assertEqual(found.dtype, torch.float32)
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0)

    def test_memory_format_changes_nothing_else(self):
        data = batch()
        plain, last = build().eval(), build(channels_last=True).eval()
        self.assertTrue(
            last.preprocess(data["image"]).is_contiguous(memory_format=torch.channels_last)
        )
        expected = plain(data)["region_logits"]
        torch.testing.assert_close(last(data)["region_logits"], expected, rtol=1e-4, atol=1e-5)


class MetricsTest(unittest.TestCase):
    def log(self, objective, data, iteration=LOG_PERIOD - 1):
        model = build(objective)
        with EventStorage(iteration) as storage:
            loss = model(data)["loss_jigsaw"].item()
        return {name: value for name, (value, _) in storage.latest().items()}, loss

    def test_names_and_values(self):
        for objective in OBJECTIVES:
            values, loss = self.log(objective, batch())
            expected = {f"objective/{name}" for name in OBJECTIVES}
            for r in range(1, 5):
                expected |= {f"region/R{r}_{what}" for what in ("loss", "top1", "top5")}
            self.assertEqual(set(values), expected)
            self.assertAlmostEqual(values[f"objective/{objective}"], loss, places=5)
            regions = [values[f"region/R{r}_loss"] for r in range(1, 5)]
            shares = [1 / 9, 2 / 9, 2 / 9, 4 / 9] if objective == "global" else [0.25] * 4
            self.assertAlmostEqual(sum(s * v for s, v in zip(shares, regions)), loss, places=5)

    def test_accuracy_of_a_known_network(self):
        # Scores are the mean colour: the class whose channel is brightest in the region wins.
        class Colours(Named):
            def forward(self, x):
                return {"res5": F.avg_pool2d(x, 32)}

        backbone = Colours(nn.Identity())
        backbone._out_features = ["res5"]
        backbone._out_feature_strides, backbone._out_feature_channels = {"res5": 32}, {"res5": 3}
        model = build(classes=2, backbone=backbone, pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3)
        model.classifier.weight.data = torch.eye(3)[:, :, None, None]
        images = torch.zeros(2, 3, 96, 96, dtype=torch.uint8)
        images[:, 1] = 100  # class 1 everywhere ...
        images[1, 2, :32, :32] = 200  # ... but class 2 in R1 of the second image
        classes = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 2]])
        with EventStorage(LOG_PERIOD - 1) as storage:
            model({"image": images, "gt_classes": classes})
        top1 = [storage.latest()[f"region/R{r}_top1"][0] for r in range(1, 5)]
        self.assertEqual(top1, [0.5, 1.0, 0.5, 0.5])
        self.assertEqual(storage.latest()["region/R3_top5"][0], 1.0)  # three classes: all in

    def test_only_in_iterations_that_are_written(self):
        values, _ = self.log("erf_adaptive", batch(), iteration=LOG_PERIOD)
        self.assertEqual(values, {})


class BufferTest(unittest.TestCase):
    def test_erf_weights_travel_in_checkpoints(self):
        model = build()
        self.assertEqual(model.erf_weights.shape, (4, 3, 3))
        self.assertTrue(torch.equal(model.erf_weights.argmax(dim=0), TINY.cell_regions(32)))
        model.erf_weights.fill_(0.25)
        other = build()
        other.load_state_dict(model.state_dict())
        self.assertTrue(torch.equal(other.erf_weights, model.erf_weights))

    def test_state_holds_network_classifier_and_weights_alone(self):
        keys = {key.split(".")[0] for key in build().state_dict()}
        self.assertEqual(keys, {"backbone", "classifier", "erf_weights", "erf_region_sums"})


class SettingsTest(unittest.TestCase):
    def test_from_config(self):
        keys = [*TINY_RESNET, "MODEL.JIGSAW.NUM_CLASSES", 3, "MODEL.JIGSAW.OBJECTIVE", "global"]
        cfg = get_jigsaw_cfg("Base-JigsawPretrain.yaml", keys)
        model = build_model(cfg)
        self.assertIsInstance(model, JigsawPretrainer)
        self.assertEqual(
            (model.objective, model.tau, model.classifier.out_channels), ("global", 0.7, 4)
        )
        self.assertEqual(model.erf_weights.shape, (4, 7, 7))

    def test_refusals(self):
        for options, message in (
            ({"objective": "dense"}, "OBJECTIVE.*dense.*erf_adaptive, block_wise"),
            ({"in_features": ["res4"]}, "res4.*OUT_FEATURES"),
            ({"num_classes": 0}, "NUM_CLASSES is 0"),
            ({"tau": 1.2}, "TAU is 1.2"),
        ):
            with self.assertRaisesRegex(ConfigError, message):
                build(**options)
        with self.assertRaises(ConfigError):
            build(template=JigsawTemplate(96, 96, 40, 32))

    def test_training_without_classes(self):
        with self.assertRaisesRegex(ConfigError, "gt_classes"):
            build()([{"image": image} for image in batch()["image"]])

    def test_images_of_another_size(self):
        with self.assertRaisesRegex(ConfigError, "template"):
            build().eval()(batch(size=128))


if __name__ == "__main__":
    unittest.main()

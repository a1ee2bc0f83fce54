"""The ERF against closed forms and brute force; and the network stays as it was."""

import unittest

import numpy as np
import torch
from helpers_networks import Named, line_operator, ones_conv, tiny_backbone, tiny_fpn
from torch import nn

from jigsaw_d2.data.template import JigsawTemplate
from jigsaw_d2.io import ConfigError, RunError
from jigsaw_d2.modeling import erf
from jigsaw_d2.modeling.erf import region_shares

SQUARE = JigsawTemplate(height=8, width=8, split_y=4, split_x=4)
TINY = JigsawTemplate(height=96, width=96, split_y=32, split_x=32)  # 3x3 cells of res5


def every_cell(h, w):
    return [(row, column) for row in range(h) for column in range(w)]


def random_images(n=2, size=96, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


class ClosedFormTest(unittest.TestCase):
    def check_separable(self, network, matrix, paths, size=12):
        """All cells, borders included, against the outer products of an integer matrix."""
        h = len(matrix)
        maps = erf.erf_maps(network, torch.randn(2, 3, size, size), every_cell(h, h), "out")
        for (row, column), found in zip(every_cell(h, h), maps):
            expected = paths * np.outer(matrix[row], matrix[column])
            np.testing.assert_array_equal(found.numpy(), expected)

    def test_one_convolution_is_a_uniform_3x3(self):
        # 5 output channels are summed, and so are the 3 input channels: 15 per pixel.
        network = Named(ones_conv(3, 5))
        (found,) = erf.erf_maps(network, torch.randn(1, 3, 8, 8), [(4, 2)], "out")
        expected = torch.zeros(8, 8)
        expected[3:6, 1:4] = 15
        torch.testing.assert_close(found, expected)
        self.check_separable(network, line_operator(12), paths=15)

    def test_stacks_are_binomial(self):
        for depth in (2, 3, 4):
            with self.subTest(depth=depth):
                line = np.array([1])
                for _ in range(depth):
                    line = np.convolve(line, [1, 1, 1])
                network = Named(ones_conv(3, 1), *(ones_conv(1, 1) for _ in range(depth - 1)))
                (found,) = erf.erf_maps(network, torch.randn(1, 3, 16, 16), [(8, 8)], "out")
                window = found[8 - depth : 9 + depth, 8 - depth : 9 + depth]
                np.testing.assert_array_equal(window.numpy(), 3 * np.outer(line, line))
                self.assertEqual(found.sum(), 3 * 9**depth)  # nothing outside the window
                matrix = np.linalg.matrix_power(line_operator(12), depth)
                self.check_separable(network, matrix, paths=3)

    def test_strided_and_dilated(self):
        strided = line_operator(6, stride=2) @ line_operator(12, stride=2)
        network = Named(ones_conv(3, 2, stride=2), ones_conv(2, 1, stride=2))
        self.check_separable(network, strided, paths=3 * 2)
        dilated = line_operator(12) @ line_operator(12, dilation=3)
        network = Named(ones_conv(3, 1, dilation=3), ones_conv(1, 4))
        self.check_separable(network, dilated, paths=3 * 4)

    def test_max_pool_sees_its_largest_pixel_alone(self):
        images = torch.zeros(1, 3, 4, 4)
        images[0, :, 1, 2] = 1.0
        (found,) = erf.erf_maps(Named(nn.MaxPool2d(2)), images, [(0, 1)], "out")
        expected = torch.zeros(4, 4)
        expected[1, 2] = 3  # gradient 1 in each of three channels
        torch.testing.assert_close(found, expected)

    def test_signs(self):
        # A 1x1 convolution with weights (2, -1, 0.5) on R, G, B: abs before the sum over channels.
        conv = nn.Conv2d(3, 1, 1, bias=False)
        conv.weight.data = torch.tensor([2.0, -1.0, 0.5]).view(1, 3, 1, 1)
        images = torch.randn(1, 3, 2, 2)
        for grad, expected in (("abs", 3.5), ("relu", 2.5)):
            found = erf.erf_maps(Named(conv), images, [(0, 0)], "out", grad)
            self.assertEqual(found[0].tolist(), [[expected, 0.0], [0.0, 0.0]])

    def test_absolute_value_before_the_mean_over_images(self):
        # |x| has slope +1 or -1: images of opposite sign must not cancel.
        images = torch.stack([torch.ones(3, 2, 2), -torch.ones(3, 2, 2)])

        class Abs(nn.Module):
            def forward(self, x):
                return x.abs()

        found = erf.erf_maps(Named(Abs()), images, [(1, 1)], "out")
        self.assertEqual(found[0].tolist(), [[0.0, 0.0], [0.0, 3.0]])

    def test_region_sums_of_a_convolution(self):
        # 3x3 of ones around cell (3, 3) on an 8x8 canvas split at 4: rows 2..4, columns 2..4, so
        # 2x2 pixels in R1, 2x1 in R2, 1x2 in R3, 1x1 in R4, each 3 (channels).
        sums = erf.erf_region_sums(Named(ones_conv(3, 1)), torch.randn(5, 3, 8, 8), SQUARE, "out")
        self.assertEqual(sums.shape, (8, 8, 4))
        self.assertEqual(sums[3, 3].tolist(), [12, 6, 6, 3])
        self.assertEqual(sums[0, 0].tolist(), [12, 0, 0, 0])  # the padding takes no part

    def test_maps_of_regions_are_sums_of_cell_maps(self):
        images = torch.randn(3, 3, 8, 8)
        network = Named(ones_conv(3, 1), nn.ReLU(), ones_conv(1, 1))
        found = erf.measure_erf(network, images, SQUARE, "out", with_maps=True, batch_size=2)
        cells = erf.erf_maps(network, images, every_cell(8, 8), "out")
        regions = SQUARE.cell_regions(1).flatten()
        for r in range(4):
            torch.testing.assert_close(found.region_maps[r], cells[regions == r].sum(dim=0))
        by_region = [found.region_maps[0][:4, :4].sum(), found.region_sums[:4, :4, 0].sum()]
        torch.testing.assert_close(by_region[0].double(), by_region[1])


def brute_force_sums(backbone, images, template, feature):
    """Each cell and image by itself; abs, RGB sum and binary masks written out."""
    masks = torch.zeros(4, template.height, template.width, dtype=torch.float64)
    for r, (x0, y0, x1, y1) in enumerate(template.boxes):
        masks[r, y0:y1, x0:x1] = 1
    backbone.eval()
    h, w = backbone(images)[feature].shape[2:]
    sums = torch.zeros(h, w, 4, dtype=torch.float64)
    for image in images:
        for row in range(h):
            for column in range(w):
                leaf = image[None].clone().requires_grad_()
                backbone(leaf)[feature][0, :, row, column].sum().backward()
                g = leaf.grad[0].abs().sum(dim=0).double()
                for r in range(4):
                    sums[row, column, r] += (g * masks[r]).sum() / len(images)
    return sums


class BackboneTest(unittest.TestCase):
    def test_resnet_equals_brute_force(self):
        backbone, images = tiny_backbone(features=("res4", "res5")), random_images()
        for feature in ("res4", "res5"):
            expected = brute_force_sums(backbone, images, TINY, feature)
            found = erf.erf_region_sums(backbone, images, TINY, feature)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    def test_every_level_of_a_pyramid(self):
        backbone, images = tiny_fpn(), random_images(1, size=128)
        template = JigsawTemplate(128, 128, 64, 64)
        for feature, cells in (("p4", 8), ("p5", 4), ("p6", 2)):
            with self.subTest(feature=feature):
                sums = erf.erf_region_sums(backbone, images, template, feature)
                self.assertEqual(sums.shape, (cells, cells, 4))
                self.assertTrue((sums.sum(dim=-1) > 0).all())
        found = erf.erf_region_sums(backbone, images, template, "p6")
        expected = brute_force_sums(backbone, images, template, "p6")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    def test_deformable_convolution(self):
        # An operator that torch.func cannot batch; its offsets depend on the input too.
        deform = ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, False, False, True]]
        backbone, images = tiny_backbone(*deform), random_images(1)
        for name, parameter in backbone.named_parameters():
            if "conv2_offset" in name:
                nn.init.normal_(parameter, std=0.1)
        expected = brute_force_sums(backbone, images, TINY, "res5")
        found = erf.erf_region_sums(backbone, images, TINY)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)

    def test_order_and_batches_of_images_do_not_matter(self):
        backbone, images = tiny_backbone(), random_images(5)
        sums = erf.erf_region_sums(backbone, images, TINY)
        shuffled = images[torch.tensor([3, 0, 4, 2, 1])]
        for batch_size in (1, 2, 5):
            other = erf.erf_region_sums(backbone, shuffled, TINY, batch_size=batch_size)
            torch.testing.assert_close(other, sums, rtol=1e-5, atol=1e-7)

    def test_mixed_precision(self):
        # Positive weights cancel nothing, so each of the three layers rounds its weights and its
        # gradients to 8 bits and no more: 6 x 2^-9 = 1.2 % at most in any share.
        convs = [nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 4), (4, 4), (4, 4))]
        for conv in convs:
            nn.init.uniform_(conv.weight)
        network, images = Named(*convs), torch.randn(2, 3, 8, 8)
        regions = SQUARE.cell_regions(1)
        exact = region_shares(erf.erf_region_sums(network, images, SQUARE, "out"), regions)
        sums = erf.erf_region_sums(network, images, SQUARE, "out", amp_dtype=torch.bfloat16)
        self.assertEqual(sums.dtype, torch.float64)
        self.assertFalse(torch.equal(region_shares(sums, regions), exact))
        torch.testing.assert_close(region_shares(sums, regions), exact, rtol=0, atol=0.012)

    def test_gradients_below_float16s_least_number_survive_it(self):
        convs = [nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 4), (4, 4), (4, 4))]
        for conv in convs:  # about 1e-8 behind the third, where 6e-8 is the least that is not 0
            nn.init.uniform_(conv.weight, 0.8e-4, 1.2e-4)
        network, images = Named(*convs), torch.randn(1, 3, 8, 8)
        exact = erf.erf_region_sums(network, images, SQUARE, "out")
        sums = erf.erf_region_sums(network, images, SQUARE, "out", amp_dtype=torch.float16)
        torch.testing.assert_close(sums.sum(), exact.sum(), rtol=0.05, atol=0)


class StateTest(unittest.TestCase):
    """The network and torch come back as they were."""

    def setUp(self):
        self.backbone = tiny_backbone()
        self.backbone.train()
        self.backbone.stem.eval()  # a mixture, as when some stages are frozen
        frozen = self.backbone.stem.conv1.weight
        frozen.requires_grad_(False)
        self.images = random_images()
        self.backbone(self.images)["res5"].sum().backward()

    def snapshot(self):
        modes = [module.training for module in self.backbone.modules()]
        flags = [p.requires_grad for p in self.backbone.parameters()]
        grads = [None if p.grad is None else p.grad.clone() for p in self.backbone.parameters()]
        state = {k: v.clone() for k, v in self.backbone.state_dict().items()}
        return modes, flags, grads, state, torch.get_rng_state(), torch.is_grad_enabled()

    def assert_unchanged(self, before):
        modes, flags, grads, state, rng, enabled = self.snapshot()
        self.assertEqual((modes, flags, enabled), (before[0], before[1], before[5]))
        for now, then in zip(grads, before[2]):
            self.assertTrue((now is None and then is None) or torch.equal(now, then))
        for key, value in state.items():
            self.assertTrue(torch.equal(value, before[3][key]), key)
        self.assertTrue(torch.equal(rng, before[4]))

    def measure(self, **options):
        return erf.erf_region_sums(self.backbone, self.images, TINY, **options)

    def test_after_a_measurement(self):
        before = self.snapshot()
        self.measure()
        self.assert_unchanged(before)
        self.assertIsNone(self.images.grad)

    def test_after_an_exception(self):
        before = self.snapshot()
        with self.assertRaisesRegex(ConfigError, "res5.*no feature 'p4'"):
            self.measure(feature="p4")
        with self.assertRaisesRegex(ConfigError, "GRAD"):
            self.measure(grad="square")
        self.assert_unchanged(before)

    def test_random_state_of_a_network_that_draws(self):
        class Noisy(nn.Module):
            def forward(self, x):
                return x * torch.rand(1)

        before = torch.get_rng_state()
        erf.erf_region_sums(Named(Noisy()), torch.randn(1, 3, 8, 8, generator=None), SQUARE, "out")
        self.assertFalse(torch.equal(before, torch.get_rng_state()))  # randn above draws
        images, before = torch.zeros(1, 3, 8, 8), torch.get_rng_state()
        erf.erf_region_sums(Named(Noisy()), images, SQUARE, "out")
        self.assertTrue(torch.equal(before, torch.get_rng_state()))

    def test_same_result_whatever_surrounds_it(self):
        expected = self.measure()
        before = self.snapshot()
        contexts = [torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)]
        for context in contexts:
            with context:
                self.assertTrue(torch.equal(self.measure(), expected), type(context))
        with torch.inference_mode():
            images = self.images * 1.0  # an inference tensor
            self.assertTrue(torch.equal(erf.erf_region_sums(self.backbone, images, TINY), expected))
        self.assert_unchanged(before)

    def test_compiled_network(self):
        expected = self.measure()
        compiled = torch.compile(self.backbone, backend="aot_eager")
        found = erf.erf_region_sums(compiled, self.images, TINY)
        self.assertTrue(torch.equal(found, expected))
        self.backbone.compile(backend="aot_eager")  # in place, as the trainer may
        self.assertTrue(torch.equal(self.measure(), expected))

    def test_training_goes_on_between_forward_and_backward(self):
        """The gradients are those that backward gives without a measurement between."""
        parameters = [p for p in self.backbone.parameters() if p.requires_grad]
        loss = self.backbone(self.images)["res5"].square().mean()
        expected = torch.autograd.grad(loss, parameters, retain_graph=True)
        self.measure()
        for found, gradient in zip(torch.autograd.grad(loss, parameters), expected):
            self.assertTrue(torch.equal(found, gradient))


class InputTest(unittest.TestCase):
    def test_wrong_images(self):
        network = Named(ones_conv(3, 1))
        for images, message in (
            (torch.randn(1, 3, 8, 10), "8x10, the template is 8x8"),
            (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "normalised float"),
            (torch.zeros(0, 3, 8, 8), "N > 0"),
        ):
            with self.assertRaisesRegex(ConfigError, message):
                erf.erf_region_sums(network, images, SQUARE, "out")

    def test_size_that_the_pyramid_cannot_take(self):
        template = JigsawTemplate(80, 80, 16, 16)
        with self.assertRaisesRegex(ConfigError, "80x80.*multiples of 32"):
            erf.erf_region_sums(tiny_fpn(), random_images(1, size=80), template, "p4")

    def test_cell_outside(self):
        with self.assertRaisesRegex(ConfigError, r"\(8, 0\).*8x8"):
            erf.erf_maps(Named(ones_conv(3, 1)), torch.zeros(1, 3, 8, 8), [(8, 0)], "out")

    def test_diverged_weights(self):
        network = Named(ones_conv(3, 1))
        network.layers[0].weight.data.fill_(float("nan"))
        with self.assertRaisesRegex(RunError, "inf or nan"):
            erf.erf_region_sums(network, torch.zeros(1, 3, 8, 8), SQUARE, "out")


if __name__ == "__main__":
    unittest.main()

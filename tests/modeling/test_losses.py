"""The three objectives against hand-derived values and against their dense forms."""

import math
import unittest

import torch
from torch.nn import functional as F

from jigsaw_d2.modeling import losses
from jigsaw_d2.modeling.erf import own_region_weights, region_weights

# One cell a region, then a canvas whose regions differ in size (3x3 cells, split after the first).
ONE_CELL_EACH = torch.tensor([[0, 1], [2, 3]])
UNEVEN = torch.tensor([[0, 1, 1], [2, 3, 3], [2, 3, 3]])


def dense_erf_loss(logits, gt_classes, weights, regions):
    """P3.4 in its own words: soft-label cross-entropy per cell, region means, mean, mean."""
    labels = losses.soft_labels(weights, gt_classes, logits.shape[1])
    cells = -(labels * F.log_softmax(logits, dim=1)).sum(dim=1)  # (N, h, w)
    per_region = [cells[:, regions == r].mean(dim=1) for r in range(4)]
    return torch.stack(per_region, dim=1).mean()


def random_case(n=3, k=11, regions=UNEVEN, tau=0.7, seed=0):
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, k, *regions.shape, generator=rng, dtype=torch.float64)
    gt_classes = torch.randint(0, k, (n, 4), generator=rng)
    sums = torch.rand(*regions.shape, 4, generator=rng, dtype=torch.float64)
    return logits, gt_classes, region_weights(sums, regions, tau), regions


class SoftLabelTest(unittest.TestCase):
    def test_hand_example(self):
        weights = torch.tensor([0.7, 0.1, 0.15, 0.05]).view(4, 1, 1)
        labels = losses.soft_labels(weights, torch.tensor([[2, 0, 3, 1]]), num_classes=5)
        expected = torch.tensor([0.1, 0.05, 0.7, 0.15, 0.0])
        torch.testing.assert_close(labels[0, :, 0, 0], expected)

    def test_equal_classes_add_their_weights(self):
        weights = torch.tensor([0.7, 0.1, 0.15, 0.05]).view(4, 1, 1)
        labels = losses.soft_labels(weights, torch.tensor([[1, 1, 0, 1]]), num_classes=2)
        torch.testing.assert_close(labels[0, :, 0, 0], torch.tensor([0.15, 0.85]))

    def test_every_cell_adds_up_to_one(self):
        _, gt_classes, weights, _ = random_case()
        labels = losses.soft_labels(weights, gt_classes, 11)
        self.assertEqual(labels.shape, (3, 11, 3, 3))
        torch.testing.assert_close(labels.sum(dim=1), torch.ones(3, 3, 3, dtype=torch.float64))


class ErfAdaptiveTest(unittest.TestCase):
    def check_equals_dense(self, logits, gt_classes, weights, regions):
        ours = logits.clone().requires_grad_()
        dense = logits.clone().requires_grad_()
        value = losses.erf_adaptive_loss(ours, gt_classes, weights, regions)
        expected = dense_erf_loss(dense, gt_classes, weights, regions)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
        value.backward()
        expected.backward()
        torch.testing.assert_close(ours.grad, dense.grad, rtol=1e-12, atol=1e-14)

    def test_value_and_gradient_equal_the_dense_form(self):
        for seed, tau in enumerate((0.0, 0.5, 0.7, 1.0)):
            with self.subTest(tau=tau):
                self.check_equals_dense(*random_case(tau=tau, seed=seed))

    def test_equal_classes_and_background_in_any_slot(self):
        logits, _, weights, regions = random_case(n=1, k=4)
        for classes in ([3, 0, 1, 2], [0, 3, 3, 1], [2, 2, 2, 2], [3, 3, 3, 3], [0, 1, 0, 1]):
            with self.subTest(classes=classes):
                self.check_equals_dense(logits, torch.tensor([classes]), weights, regions)

    def test_shares_of_exactly_zero_and_one(self):
        logits, gt_classes, _, regions = random_case()
        sums = torch.zeros(3, 3, 4, dtype=torch.float64)
        for cell in range(9):  # every cell sees one region alone: now its own, now the next one
            row, column = divmod(cell, 3)
            sums[row, column, (regions[row, column] + cell % 2) % 4] = 1.0
        for tau in (0.0, 0.5, 1.0):
            with self.subTest(tau=tau):
                weights = region_weights(sums, regions, tau)
                self.check_equals_dense(logits, gt_classes, weights, regions)

    def test_hand_example(self):
        # Two classes; every cell's logits are (0, log 3), so p = (1/4, 3/4). Weights 0.7 own, 0.1
        # each other; classes (0, 1, 1, 1). R1: 0.7 log 4 + 0.3 log(4/3); others: 0.1 log 4 + 0.9
        # log(4/3). Mean of the four = 0.25 log 4 + 0.75 log(4/3).
        logits = torch.tensor([0.0, math.log(3)]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
        weights = (own_region_weights(ONE_CELL_EACH) * 0.6 + 0.1).float()
        classes = torch.tensor([[0, 1, 1, 1]])
        value = losses.erf_adaptive_loss(logits, classes, weights, ONE_CELL_EACH)
        self.assertAlmostEqual(value.item(), 0.25 * math.log(4) + 0.75 * math.log(4 / 3), places=6)

    def test_regions_count_alike_whatever_their_size(self):
        # Cells of R4 (four of nine) cost log 2, all others nothing: a quarter of log 2, not 4/9.
        logits = torch.full((1, 2, 3, 3), 0.0)
        logits[:, 0, UNEVEN != 3] = 1e4
        own = own_region_weights(UNEVEN).float()
        value = losses.erf_adaptive_loss(logits, torch.tensor([[0, 0, 0, 0]]), own, UNEVEN)
        self.assertAlmostEqual(value.item(), math.log(2) / 4, places=6)

    def test_tau_one_is_the_hard_label_of_each_cell(self):
        logits, gt_classes, _, regions = random_case()
        weights = region_weights(torch.ones(3, 3, 4), regions, tau=1.0)
        hard = F.cross_entropy(logits, gt_classes[:, regions], reduction="none")
        means = torch.stack([hard[:, regions == r].mean(dim=1) for r in range(4)], dim=1)
        value = losses.erf_adaptive_region_losses(logits, gt_classes, weights, regions)
        torch.testing.assert_close(value, means)

    def test_gradient_written_out_is_the_true_one(self):
        logits, gt_classes, weights, regions = random_case(n=2, k=5)
        gt_classes[0] = torch.tensor([4, 4, 0, 4])
        logits.requires_grad_()
        for loss in (
            lambda x: losses.erf_adaptive_region_losses(x, gt_classes, weights, regions),
            lambda x: losses.global_region_losses(x, gt_classes),
        ):
            self.assertTrue(torch.autograd.gradcheck(loss, logits))


class OtherObjectivesTest(unittest.TestCase):
    def test_block_wise_pools_before_it_classifies(self):
        _, gt_classes, _, regions = random_case()
        features = torch.randn(3, 5, 3, 3, dtype=torch.float64)
        kernel, bias = torch.randn(11, 5, dtype=torch.float64), torch.randn(11, dtype=torch.float64)
        expected = []
        for r in range(4):  # appendix B: pool the region's features, then classify them
            pooled = features[:, :, regions == r].mean(dim=2)
            expected.append(F.cross_entropy(pooled @ kernel.T + bias, gt_classes[:, r]))
        logits = F.conv2d(features, kernel[:, :, None, None], bias)
        value = losses.block_wise_loss(logits, gt_classes, regions)
        torch.testing.assert_close(value, torch.stack(expected).mean())

    def test_global_is_one_label_weighted_by_area(self):
        logits, gt_classes, _, _ = random_case()
        shares = torch.tensor([4096.0, 10240.0, 10240.0, 25600.0], dtype=torch.float64) / 50176
        labels = torch.zeros(3, 11, dtype=torch.float64)
        for n in range(3):
            for r in range(4):
                labels[n, gt_classes[n, r]] += shares[r]
        expected = F.cross_entropy(logits.mean(dim=(2, 3)), labels)
        value = losses.global_loss(logits, gt_classes, shares)
        torch.testing.assert_close(value, expected)

    def test_objectives_agree_on_constant_logits_and_one_class(self):
        logits = torch.randn(2, 6, 1, 1).expand(2, 6, 3, 3)
        classes = torch.tensor([[4] * 4, [5] * 4])
        expected = F.cross_entropy(logits[:, :, 0, 0], torch.tensor([4, 5]))
        weights = region_weights(torch.rand(3, 3, 4), UNEVEN).float()
        for value in (
            losses.erf_adaptive_loss(logits, classes, weights, UNEVEN),
            losses.block_wise_loss(logits, classes, UNEVEN),
            losses.global_loss(logits, classes, torch.tensor([0.1, 0.2, 0.2, 0.5])),
        ):
            torch.testing.assert_close(value, expected)


class PrecisionTest(unittest.TestCase):
    def evaluate_all(self, logits, gt_classes, weights, regions):
        shares = torch.tensor([0.1, 0.2, 0.2, 0.5])
        return [
            losses.erf_adaptive_loss(logits, gt_classes, weights, regions),
            losses.block_wise_loss(logits, gt_classes, regions),
            losses.global_loss(logits, gt_classes, shares),
        ]

    def test_float32_under_autocast(self):
        logits, gt_classes, weights, regions = random_case()
        for dtype in (torch.bfloat16, torch.float16):
            rounded = logits.to(dtype)
            case = (gt_classes, weights.float(), regions)
            expected = self.evaluate_all(rounded.float(), *case)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                values = self.evaluate_all(rounded, *case)
            for value, wanted in zip(values, expected):
                self.assertEqual(value.dtype, torch.float32)
                self.assertEqual(value.item(), wanted.item())

    def test_huge_logits_stay_finite(self):
        logits, gt_classes, weights, regions = random_case()
        case = (gt_classes, weights.float(), regions)
        for value in self.evaluate_all(logits.float() * 1e6, *case):
            self.assertTrue(torch.isfinite(value))


class RegionReductionTest(unittest.TestCase):
    def test_region_means_by_hand(self):
        values = torch.arange(9.0).view(1, 3, 3)
        # R1: 0. R2: (1 + 2) / 2. R3: (3 + 6) / 2. R4: (4 + 5 + 7 + 8) / 4.
        expected = torch.tensor([[0.0, 1.5, 4.5, 6.0]])
        torch.testing.assert_close(losses.region_means(values, UNEVEN), expected)

    def test_ranks(self):
        logits = torch.tensor([[[3.0, 1.0, 2.0], [0.0, 0.0, 0.0], [1.0, math.nan, 0.0]]])
        ranks = losses.region_ranks(logits, torch.tensor([[2, 0, 1]]))
        # Second of three; a tie counts against the class; so does nan.
        self.assertEqual(ranks.tolist(), [[1, 2, 2]])


if __name__ == "__main__":
    unittest.main()

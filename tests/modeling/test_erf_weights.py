"""Eq. 2 against itself written out, by hand, and at its edges."""

import unittest

import numpy as np
import torch

from jigsaw_d2.data.template import JigsawTemplate
from jigsaw_d2.io import ConfigError, RunError
from jigsaw_d2.modeling import erf as erf_weights

TINY = JigsawTemplate(height=96, width=96, split_y=32, split_x=32)


def literal_weights(maps, template, regions, tau):
    """Eq. 2 by double loop over cells and pixels with binary masks M^i; maps (h, w, H, W)."""
    h, w = regions.shape
    weights = np.zeros((4, h, w))
    for j in range(h):
        for k in range(w):
            inside = [0.0] * 4
            for y in range(template.height):
                for x in range(template.width):
                    for i, (x0, y0, x1, y1) in enumerate(template.boxes):
                        mask = 1 if x0 <= x < x1 and y0 <= y < y1 else 0
                        inside[i] += float(maps[j, k, y, x]) * mask
            r, total = int(regions[j, k]), sum(inside)
            own = max(tau, inside[r] / total)
            for i in range(4):
                others = (1 - own) * inside[i] / (total - inside[r]) if i != r else own
                weights[i, j, k] = others
    return weights


class RegionWeightsTest(unittest.TestCase):
    def test_equals_a_literal_double_loop(self):
        template = JigsawTemplate(height=8, width=10, split_y=2, split_x=4)
        regions = template.cell_regions(2)
        rng = np.random.default_rng(0)
        maps = rng.random((4, 5, 8, 10)) ** 4
        boxes = template.boxes
        sums = np.stack([maps[:, :, a[1] : a[3], a[0] : a[2]].sum(axis=(2, 3)) for a in boxes], -1)
        for tau in (0.0, 0.3, 0.5, 0.7, 1.0):
            with self.subTest(tau=tau):
                found = erf_weights.region_weights(torch.from_numpy(sums), regions, tau)
                expected = literal_weights(maps, template, regions, tau)
                np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
                np.testing.assert_allclose(found.sum(dim=0).numpy(), 1, rtol=1e-12)

    def weights_of(self, sums, region, tau):
        """One cell of region ``region``."""
        cell = torch.tensor([[region]])
        return (
            erf_weights.region_weights(torch.tensor(sums).view(1, 1, 4), cell, tau)
            .flatten()
            .tolist()
        )

    def test_by_hand(self):
        # share 0.5 < tau = 0.7: own weight 0.7; the rest, 0.3, in proportion 30 : 10 : 10.
        expected = [0.18, 0.7, 0.06, 0.06]
        np.testing.assert_allclose(self.weights_of([30.0, 50.0, 10.0, 10.0], 1, 0.7), expected)
        # share 0.8 > tau: Eq. 2 leaves the shares as they are.
        found = self.weights_of([4.0, 8.0, 4.0, 64.0], 3, 0.7)
        np.testing.assert_allclose(found, [0.05, 0.1, 0.05, 0.8])

    def test_share_of_exactly_one_or_zero(self):
        for tau in (0.0, 0.5, 1.0):
            self.assertEqual(self.weights_of([0.0, 0.0, 9.0, 0.0], 2, tau), [0, 0, 1, 0])
            found = self.weights_of([3.0, 0.0, 1.0, 0.0], 1, tau)
            np.testing.assert_allclose(found, [0.75 * (1 - tau), tau, 0.25 * (1 - tau), 0])

    def test_nearly_all_inside_keeps_its_digits(self):
        found = self.weights_of([1.0, 3e-18, 1e-18, 0.0], 0, 0.7)
        self.assertAlmostEqual(sum(found), 1.0)
        self.assertTrue(np.isfinite(found).all())

    def test_dead_cell_learns_its_own_label(self):
        self.assertEqual(self.weights_of([0.0] * 4, 2, 0.7), [0, 0, 1, 0])

    def test_tau_one_is_the_own_region(self):
        regions = TINY.cell_regions(32)
        found = erf_weights.region_weights(torch.rand(3, 3, 4), regions, tau=1.0)
        self.assertTrue(torch.equal(found, erf_weights.own_region_weights(regions)))

    def test_scale_does_not_matter(self):
        regions, sums = TINY.cell_regions(32), torch.rand(3, 3, 4, dtype=torch.float64)
        expected = erf_weights.region_weights(sums, regions)
        torch.testing.assert_close(erf_weights.region_weights(sums * 1e-30, regions), expected)

    def test_refusals(self):
        regions, sums = TINY.cell_regions(32), torch.ones(3, 3, 4)
        for bad, tau, message in (
            (sums, 1.5, "TAU"),
            (sums[:2], 0.7, "do not fit"),
            (sums * float("nan"), 0.7, "inf or nan"),
            (-sums, 0.7, "negative"),
        ):
            with self.assertRaisesRegex((ConfigError, RunError), message):
                erf_weights.region_weights(bad, regions, tau)


class SummaryTest(unittest.TestCase):
    def test_shares_by_hand(self):
        regions = torch.tensor([[0, 1], [2, 3]])
        sums = torch.tensor([[[8, 1, 1, 0], [0, 1, 0, 3]], [[0, 0, 5, 0], [0, 0, 0, 0]]])
        shares = erf_weights.region_shares(sums, regions)
        expected = [[0.8, 0.1, 0.1, 0], [0, 0.25, 0, 0.75], [0, 0, 1, 0], [0, 0, 0, 0]]
        np.testing.assert_allclose(shares.numpy(), expected)
        outside = erf_weights.outside_shares(sums, regions)
        np.testing.assert_allclose(outside.numpy(), [0.2, 0.75, 0, 0], atol=1e-15)
        table = erf_weights.format_summary(
            sums, erf_weights.own_region_weights(regions), regions
        ).splitlines()
        self.assertEqual(len(table), 5)  # a head and four rows
        self.assertEqual(
            table[2].split()[-9:], "0.000 0.250 0.000 0.750 0.750 0.000 1.000 0.000 0.000".split()
        )


if __name__ == "__main__":
    unittest.main()

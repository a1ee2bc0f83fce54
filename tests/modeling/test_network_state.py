"""A borrowed network comes back as it was, whatever it was wrapped in and however the loan ended.

What an ERF measurement leaves untouched is tested with it, in ``test_erf``.
"""

import unittest

import torch
from torch import nn

from jigsaw_d2.modeling.erf import measuring, unwrap


def build():
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Dropout())
    network.train()
    network[1].eval()
    network[0].bias.requires_grad_(False)
    return network


class MeasuringTest(unittest.TestCase):
    def test_inside_it_is_frozen_and_gradients_are_on(self):
        network = build()
        with torch.no_grad(), measuring(network) as lent:
            self.assertIs(lent, network)
            self.assertTrue(torch.is_grad_enabled())
            self.assertFalse(any(module.training for module in network.modules()))
            self.assertFalse(any(p.requires_grad for p in network.parameters()))

    def test_outside_it_is_as_before_even_after_an_exception(self):
        for failing in (False, True):
            network, state = build(), torch.get_rng_state()
            with torch.no_grad():
                try:
                    with measuring(network):
                        torch.rand(1)
                        if failing:
                            raise KeyError
                except KeyError:
                    pass
                self.assertFalse(torch.is_grad_enabled())
            self.assertEqual([module.training for module in network], [True, False, True])
            flags = [p.requires_grad for p in network.parameters()]
            self.assertEqual(flags, [True, False, True, True])
            self.assertTrue(torch.equal(torch.get_rng_state(), state))


class UnwrapTest(unittest.TestCase):
    def test_compiled_and_bare(self):
        network = build()
        self.assertIs(unwrap(network), network)
        self.assertIs(unwrap(torch.compile(network)), network)


if __name__ == "__main__":
    unittest.main()

"""random_state.py: every global generator goes on where it was, through a file."""

import random

import numpy as np
import torch

from jigsaw_d2.engine.state import gather_random_states, get_random_state, set_random_state

CPU = torch.device("cpu")


def draw() -> tuple:
    legacy = np.random.normal  # one half of a pair is kept inside the generator
    return random.random(), random.gauss(0, 1), float(legacy()), torch.rand(3).tolist()


def test_draws_repeat_after_a_round_trip_through_a_file(tmp_path):
    outside = get_random_state(CPU)
    try:
        draw()
        torch.save(gather_random_states(CPU), tmp_path / "state.pth")
        expected = [draw() for _ in range(3)]
        (state,) = torch.load(tmp_path / "state.pth", weights_only=True)
        set_random_state(state, CPU)
        assert [draw() for _ in range(3)] == expected
    finally:
        set_random_state(outside, CPU)

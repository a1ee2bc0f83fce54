"""Every random generator that training may draw from, saved and restored as plain values.

The Jigsaw images themselves need none of it (they follow from seed and position); a backbone with
dropout or stochastic depth does.
"""

import random
from typing import Any

import numpy as np
import torch
from detectron2.utils import comm


def get_random_state(device: torch.device) -> dict[str, Any]:
    """States of Python's, NumPy's and PyTorch's global generators: tensors, numbers and strings.

    ``torch.load(weights_only=True)`` reads them back.

    Args:
        device: its generator is among them where it is a GPU.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Continue where ``get_random_state`` was called; a CUDA state matters on a GPU only."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def gather_random_states(device: torch.device) -> list[dict[str, Any]]:
    """States of all ranks, in order, on every rank; all of them must call it."""
    return comm.all_gather(get_random_state(device))

"""Small sample stores for tests, drawn from a seed."""

from pathlib import Path

import numpy as np

from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.data.store_writer import StoreWriter


def draw_image(height: int, width: int, hue: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 RGB (height, width, 3): smooth waves whose colour depends on ``hue``, and noise."""
    y, x = np.mgrid[0:height, 0:width]
    phases = np.array([0.0, 2.1, 4.2]) + hue
    waves = np.sin(x[..., None] / 17 + phases) + np.cos(y[..., None] / 23 + phases)
    noisy = 128 + 50 * waves + rng.normal(0, 6, (height, width, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def make_store(
    path: str | Path,
    n_per_group: int = 8,
    classes: int = 3,
    seed: int = 0,
    size_range: tuple[int, int] = (20, 300),
    encoding: str = "jpeg",
) -> SampleStore:
    """Write and open a store of ``n_per_group`` samples in each of S, T and W.

    Classes go round, background (index ``classes``) included; long sides are uniform over
    ``size_range``; a positive's annotated box leaves a fifth of context on each side.
    """
    rng = np.random.default_rng(seed)
    with StoreWriter(path, [f"class{c}" for c in range(classes)]) as writer:
        for number in range(3 * n_per_group):
            long = int(rng.integers(size_range[0], size_range[1] + 1))
            ratio = (rng.uniform(0.75, 1.0), rng.uniform(0.2, 0.45), rng.uniform(0.2, 0.45))
            short = max(1, int(long * ratio[number % 3]))
            height, width = [(short, long), (long, short), (short, long)][number % 3]
            label = (number // 3) % (classes + 1)
            box = np.array([10, 20, 10 + width, 20 + height], np.float32)
            inset = np.array([width // 5, height // 5, -(width // 5), -(height // 5)], np.float32)
            writer.add(
                draw_image(height, width, label, rng),
                label,
                image_id=1000 + number,
                box=box,
                gt_box=box if label == classes else box + inset,
                windows=max(height, width) > 80,
                encoding=encoding,
            )
        writer.finish()
    return SampleStore(path)

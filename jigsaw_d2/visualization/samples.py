"""Samples of a store as they will be cut, with annotated boxes, classes and groups (Sec. 3.1)."""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from jigsaw_d2.data.arrays import show
from jigsaw_d2.data.samples import GROUPS
from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.visualization.extraction_report import GROUP_COLORS
from jigsaw_d2.visualization.figures import draw_box, save_figure

COLUMNS = 8


def choose_samples(store: SampleStore, count: int, rng: np.random.Generator) -> np.ndarray:
    """int64 (n,) distinct samples, n <= ``count``: the groups in turn, negatives in their share."""
    groups = np.asarray(store.groups)
    piles = [rng.permutation(np.flatnonzero(groups == g)) for g in range(len(GROUPS))]
    turns = [(turn, g, i) for g, pile in enumerate(piles) for turn, i in enumerate(pile[:count])]
    return np.array([i for _, _, i in sorted(turns)[:count]], np.int64)


def samples_figure(store: SampleStore, samples: np.ndarray) -> Figure:
    """A grid of samples (ids of shape (n,)); dashed: the annotated box, around it the context."""
    rows = max(-(-len(samples) // COLUMNS), 1)
    figure = Figure(figsize=(2 * COLUMNS, 2.3 * rows), layout="constrained")
    grid = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    names = [*store.categories, "background"]
    for axes in grid:
        axes.set_axis_off()
    for axes, i in zip(grid, samples):
        image, group, label = store.decode(i), GROUPS[store.groups[i]], store.classes[i]
        axes.imshow(show(image))
        axes.set_title(f"{names[label]}\n{group} {image.shape[1]}x{image.shape[0]}", fontsize=8)
        box = store.gt_boxes[i] - np.tile(store.boxes[i, :2], 2)
        style = "-" if label == len(store.categories) else "--"
        draw_box(axes, box, GROUP_COLORS[group], linestyle=style)
    return figure


def run(args: argparse.Namespace) -> list[Path]:
    """Write the figure; returns its path."""
    store = SampleStore(args.store)
    samples = args.indices or choose_samples(store, args.count, np.random.default_rng(args.seed))
    return [save_figure(samples_figure(store, np.asarray(samples)), args.output)]

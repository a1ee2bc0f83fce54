"""Jigsaw images with their regions, classes, and the pixels that show a sample (Fig. 4c)."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.data.arrays import show
from jigsaw_d2.data.build import JigsawLoader, build_jigsaw_train_loader, fit_input
from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.data.template import REGIONS, JigsawTemplate
from jigsaw_d2.visualization.figures import draw_box, save_figure

REGION_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231")
PADDING_COLOUR = np.array([70, 70, 90], np.uint8)


def shade_padding(image: np.ndarray, used_boxes: np.ndarray) -> np.ndarray:
    """A copy of uint8 (H, W, 3), striped outside ``used_boxes``, int (4, 4) XYXY canvas pixels."""
    height, width = image.shape[:2]
    padded = np.ones((height, width), bool)
    for x0, y0, x1, y1 in used_boxes:
        padded[y0:y1, x0:x1] = False
    stripes = (np.arange(height)[:, None] + np.arange(width)) // 4 % 2 == 0
    shaded = image.copy()
    shaded[padded & stripes] = PADDING_COLOUR
    return shaded


def used_share(used_boxes: np.ndarray, template: JigsawTemplate) -> float:
    """Part of the canvas that shows samples; ``used_boxes`` (4, 4) XYXY canvas pixels."""
    sides = used_boxes[:, 2:] - used_boxes[:, :2]
    return float(sides.prod(axis=1).sum() / (template.height * template.width))


def batch_figure(batch: Mapping[str, Any], loader: JigsawLoader, count: int = 8) -> Figure:
    """A sheet of the first images of a batch that ``loader`` yielded."""
    mapper = loader.dataset.mapper
    count = min(count, len(batch["image"]))
    positions = [batch["position"] + n * loader.position_step for n in range(count)]
    images: Tensor = batch["image"][:count].cpu().permute(0, 2, 3, 1)
    if mapper.image_format == "BGR":
        images = images.flip(3)
    ids = batch["sample_ids"][:count].tolist()
    used_boxes = [mapper.used_boxes(p, row) for p, row in zip(positions, ids)]
    shares = [used_share(boxes, mapper.template) for boxes in used_boxes]
    names = [*mapper.store.categories, "background"]
    columns = min(4, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(3.4 * columns, 3.7 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels:
        panel.set_axis_off()
    for n, (panel, image) in enumerate(zip(panels, images.numpy())):
        panel.imshow(shade_padding(show(image), used_boxes[n]))
        panel.set_title(f"image {positions[n]}: {shares[n]:.0%} used", fontsize=9)
        classes = batch["gt_classes"][n].tolist()
        for region, c, colour, box in zip(REGIONS, classes, REGION_COLOURS, mapper.template.boxes):
            draw_box(panel, box, colour, linewidth=2)
            style = {"facecolor": colour, "alpha": 0.8, "pad": 1, "linewidth": 0}
            corner, text = (box[0] + 3, box[1] + 4), f"{region} {names[c]}"
            panel.text(*corner, text, color="white", fontsize=7, va="top", bbox=style)
    text = f"{np.mean(shares):.0%} of the pixels show a sample; padding is striped"
    figure.suptitle(text, fontsize=10)
    return figure


def run(args: argparse.Namespace) -> list[Path]:
    """Write the sheet; returns its path."""
    cfg = get_jigsaw_cfg(args.config_file, list(args.opts))
    cfg.SEED, cfg.DATALOADER.NUM_WORKERS = args.seed, 0
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATION_STEPS = args.count, 1
    store = SampleStore(list(args.store))
    fit_input(cfg, store)
    loader = build_jigsaw_train_loader(cfg, store=store)
    batch = loader.dataset[range(args.first, args.first + args.count)]
    return [save_figure(batch_figure(batch, loader, args.count), args.output)]

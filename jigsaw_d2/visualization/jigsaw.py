"""Jigsaw images with their regions, classes, and the pixels that show a sample (Fig. 4c)."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.data.build import JigsawLoader, build_jigsaw_train_loader
from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.data.template import REGIONS, JigsawTemplate

REGION_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231")
PADDING_COLOUR = np.array([70, 70, 90], np.uint8)


def shade_padding(image: np.ndarray, used_boxes: np.ndarray) -> np.ndarray:
    """A copy of uint8 (H, W, 3) in which all that shows no sample is striped.

    Args:
        used_boxes: int (4, 4) XYXY canvas pixels that show a sample.
    """
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


def jigsaw_figure(
    images: np.ndarray,
    names: Sequence[Sequence[str]],
    used_boxes: np.ndarray,
    template: JigsawTemplate,
    titles: Sequence[str],
    columns: int = 4,
) -> Figure:
    """A sheet of Jigsaw images.

    Args:
        images: uint8 (N, H, W, 3) RGB.
        names: N times the four classes' names, R1..R4.
        used_boxes: int (N, 4, 4) XYXY canvas pixels that show a sample; the rest is striped.
        titles: N; the used part of the canvas is added.
    """
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(3.4 * columns, 3.7 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels:
        panel.set_axis_off()
    for panel, image, row, boxes, title in zip(panels, images, names, used_boxes, titles):
        panel.imshow(shade_padding(image, boxes))
        panel.set_title(f"{title}: {used_share(boxes, template):.0%} used", fontsize=9)
        for region, name, colour, (x0, y0, x1, y1) in zip(
            REGIONS, row, REGION_COLOURS, template.boxes
        ):
            outline = (x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0
            panel.add_patch(Rectangle(*outline, fill=False, edgecolor=colour, linewidth=2))
            box = {"facecolor": colour, "alpha": 0.8, "pad": 1, "linewidth": 0}
            text = f"{region} {name}"
            panel.text(x0 + 3, y0 + 4, text, color="white", fontsize=7, va="top", bbox=box)
    mean = np.mean([used_share(boxes, template) for boxes in used_boxes])
    figure.suptitle(f"{mean:.0%} of the pixels show a sample; padding is striped", fontsize=10)
    return figure


def batch_figure(batch: Mapping[str, Any], loader: JigsawLoader, count: int = 8) -> Figure:
    """The first images of a batch that ``loader`` yielded."""
    mapper = loader.dataset.mapper
    count = min(count, len(batch["image"]))
    positions = [batch["position"] + n * loader.position_step for n in range(count)]
    images: Tensor = batch["image"][:count].cpu()
    if mapper.image_format == "BGR":
        images = images.flip(1)
    ids = batch["sample_ids"][:count].tolist()
    names = [*mapper.store.categories, "background"]
    return jigsaw_figure(
        images.permute(0, 2, 3, 1).numpy(),
        [[names[c] for c in row] for row in batch["gt_classes"][:count].tolist()],
        np.stack([mapper.used_boxes(p, row) for p, row in zip(positions, ids)]),
        mapper.template,
        [f"image {p}" for p in positions],
    )


def figure_pixels(figure: Figure) -> np.ndarray:
    """uint8 (height, width, 3) RGB of a figure, as TensorBoard takes images (format HWC)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save_batch_figure(
    batch: Mapping[str, Any], loader: JigsawLoader, path: str | Path
) -> np.ndarray:
    """Write ``batch_figure`` as PNG; returns its pixels, uint8 (3, height, width) RGB.

    The form is that of ``EventStorage.put_image``.
    """
    figure = batch_figure(batch, loader)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    return figure_pixels(figure).transpose(2, 0, 1)


def run(args: argparse.Namespace) -> list[Path]:
    """Write the sheet; returns its path."""
    store = SampleStore(list(args.store))
    cfg = get_jigsaw_cfg(args.config_file, list(args.opts))
    cfg.SEED, cfg.DATALOADER.NUM_WORKERS = args.seed, 0
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATION_STEPS = args.count, 1
    loader = build_jigsaw_train_loader(cfg, store=store)
    batch = loader.dataset[range(args.first, args.first + args.count)]
    path = Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    batch_figure(batch, loader, args.count).savefig(path, dpi=100)
    return [path]

"""Effective receptive fields as figures: networks side by side on one colour scale (Fig. 6)."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from jigsaw_d2.data.template import JigsawTemplate
from jigsaw_d2.detection.config import load_detection_config
from jigsaw_d2.io import ConfigError
from jigsaw_d2.modeling.erf import (
    DEFINITION,
    GRAD_WORDS,
    measure_erf,
    outside_shares,
    region_shares,
)
from jigsaw_d2.visualization.inputs import (
    load_network,
    normalise,
    random_images,
    read_images,
    rgb_stream,
)

COLOUR_MAP = "inferno"


def erf_figure(
    names: Sequence[str],
    maps: Sequence[Tensor],
    shares: Sequence[Tensor],
    template: JigsawTemplate,
    title: str = "",
) -> Figure:
    """Fig. 6: one row a network, one column a region's cells, and the table of shares at the right.

    Each map is divided by its mean, so 1 means "as if spread evenly over the canvas"; all panels
    share one colour scale, compressed by a square root so that the tails show.

    Args:
        names: of the networks.
        maps: float (S, H, W) of each, ``ErfMeasurement.region_maps``.
        shares: float (S, S) of each, ``region_shares``.
        template: its regions are outlined, the measured cells' own region boldly.
        title: a line above, for example the definition.
    """
    density = [_density(each) for each in maps]
    norm = PowerNorm(0.5, vmin=0, vmax=max(float(each.max()) for each in density))
    figure = Figure(figsize=(13, 2.6 * len(names) + 0.9), layout="constrained")
    axes = figure.subplots(len(names), 5, squeeze=False, width_ratios=[1, 1, 1, 1, 1.5])
    for row, name in enumerate(names):
        for region in range(4):
            panel = axes[row, region]
            image = panel.imshow(density[row][region], cmap=COLOUR_MAP, norm=norm)
            _outline(panel, template, region)
            outside = 1 - float(shares[row][region, region])
            panel.set_title(f"cells of R{region + 1}: {outside:.1%} outside", fontsize=9)
        axes[row, 0].set_ylabel(name, fontsize=10)
        _share_table(axes[row, 4], shares[row].cpu().numpy())
    bar = figure.colorbar(image, ax=axes[:, :4], location="bottom", fraction=0.05, aspect=60)
    bar.set_label(
        "ERF density (1 = spread evenly over the canvas; square-root colours)", fontsize=9
    )
    if title:
        figure.suptitle(title, fontsize=9, wrap=True)
    return figure


def figure_pixels(figure: Figure) -> np.ndarray:
    """The drawn figure as uint8 (3, height, width) RGB, the layout that TensorBoard takes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3].transpose(2, 0, 1))


def _density(maps: Tensor) -> np.ndarray:
    """Float (S, H, W) maps, each with mean 1; a dead one stays zero."""
    values = maps.detach().cpu().double().numpy()
    mean = values.mean(axis=(1, 2), keepdims=True)
    return values / np.where(mean > 0, mean, 1)


def _outline(panel, template: JigsawTemplate, own: int) -> None:
    for region, (x0, y0, x1, y1) in enumerate(np.asarray(template.boxes)):
        style = {"edgecolor": "cyan", "linewidth": 2.0} if region == own else _FAINT
        order = 3 if region == own else 2
        corner = (x0 - 0.5, y0 - 0.5)  # imshow centres pixel 0 on 0
        panel.add_patch(Rectangle(corner, x1 - x0, y1 - y0, fill=False, zorder=order, **style))
    panel.set_xticks([])
    panel.set_yticks([])


_FAINT = {"edgecolor": "white", "linewidth": 0.6}


def _share_table(panel, shares: np.ndarray) -> None:
    """Where the ERF of each region's cells lies, as numbers; the own region in bold."""
    panel.axis("off")
    names = [f"R{r + 1}" for r in range(4)]
    cells = [[f"{value:.1%}" for value in row] for row in shares]
    table = panel.table(
        cells, rowLabels=[f"cells of {n}" for n in names], colLabels=names, loc="center"
    )
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    for r in range(4):
        table[r + 1, r].get_text().set_fontweight("bold")
    panel.text(0.5, 0.8, "share of ERF in each region", ha="center", fontsize=9)


def cell_figure(
    maps: Tensor, cells: Sequence[tuple[int, int]], stride: int, title: str = ""
) -> Figure:
    """The ERF of single cells over the input, one panel each, one colour scale.

    Args:
        maps: float (len(cells), H, W).
        cells: (row, column) of each; a row of panels for every row of cells.
        stride: pixels per cell; outlines the pixels that the cell stands on.
        title: a line above.
    """
    density = _density(maps)
    norm = PowerNorm(0.5, vmin=0, vmax=max(float(density.max()), 1e-12))
    rows = len({row for row, _ in cells})
    columns = -(-len(cells) // rows)
    figure = Figure(figsize=(3.0 * columns + 0.6, 3.0 * rows + 1.0), layout="compressed")
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel, (row, column), values in zip(axes.flat, cells, density):
        image = panel.imshow(values, cmap=COLOUR_MAP, norm=norm)
        corner = (column * stride - 0.5, row * stride - 0.5)
        panel.add_patch(Rectangle(corner, stride, stride, fill=False, edgecolor="cyan"))
        panel.set_title(f"cell ({row}, {column})", fontsize=9)
        panel.set_xticks([])
        panel.set_yticks([])
    bar = figure.colorbar(image, ax=axes, location="bottom", fraction=0.05, aspect=50)
    bar.set_label("ERF density (1 = spread evenly over the input; square-root colours)", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=9, wrap=True)
    return figure


def map_size(erf: Tensor) -> dict[str, float]:
    """How far one ERF, float (H, W), reaches, in pixels; zeros for a dead one.

    Returns:
        radius_50, radius_90: around its centre of mass, of the circle that holds so much of it.
        side_luo: square root of the number of pixels above 4.55 % of the peak, the measure of Luo
            et al. 2016.
    """
    values = erf.detach().cpu().double().numpy()
    total = values.sum()
    if total <= 0:
        return {"radius_50": 0.0, "radius_90": 0.0, "side_luo": 0.0}
    y, x = np.indices(values.shape)
    distance = np.hypot(y - (values * y).sum() / total, x - (values * x).sum() / total).ravel()
    order = np.argsort(distance)
    mass = np.cumsum(values.ravel()[order]) / total
    radii = [
        float(distance[order[min(np.searchsorted(mass, q), mass.size - 1)]]) for q in (0.5, 0.9)
    ]
    side = float(np.sqrt((values > (1 - 0.9545) * values.max()).sum()))
    return {"radius_50": radii[0], "radius_90": radii[1], "side_luo": side}


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as an image file, the format taken from its suffix."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def run(args: argparse.Namespace) -> list[Path]:
    """Measure each network on the same images, normalised as its config says; draw and write."""
    count = len(args.weights)
    configs, features = (
        given * count if len(given) == 1 else given for given in (args.config_file, args.feature)
    )
    names = args.names or [Path(weights).name for weights in args.weights]
    if {len(configs), len(features), len(names)} != {count}:
        raise ConfigError(
            f"{count} --weights, {len(args.config_file)} --config-file, {len(args.feature)} "
            f"--feature and {len(args.names)} --names do not go together"
        )
    images, measured, rows = None, [], []
    for config, feature, weights, name in zip(configs, features, args.weights, names):
        feature = feature or load_detection_config(config, args.opts).MODEL.JIGSAW.IN_FEATURE
        network, cfg = load_network(
            config, feature, weights, args.opts, seed=args.seed, device=args.device
        )
        template = JigsawTemplate(*cfg.INPUT.JIGSAW.TEMPLATE_SIZE, *cfg.INPUT.JIGSAW.TEMPLATE_SPLIT)
        if images is None:
            images = _choose_images(args, cfg, template)
        inputs = normalise(images, cfg) if images.dtype == torch.uint8 else images
        found = measure_erf(network, inputs, template, feature, args.grad, with_maps=True)
        regions = template.cell_regions(network.output_shape()[feature].stride)
        regions = regions.to(found.region_sums.device)
        shares = region_shares(found.region_sums, regions).cpu()
        measured.append((found.region_maps, shares))
        outside = outside_shares(found.region_sums, regions).tolist()
        rows.append({"name": name, "config": config, "weights": weights, "feature": feature})
        rows[-1] |= {"shares": shares.tolist(), "outside": outside}
    definition = DEFINITION.format(grad=GRAD_WORDS[args.grad], images=len(images))
    figure = erf_figure(names, *zip(*measured), template, definition)
    numbers = Path(args.output).with_suffix(".json")
    written = [save_figure(figure, args.output), numbers]
    numbers.write_text(json.dumps({"definition": definition, "networks": rows}, indent=1) + "\n")
    return written


def _choose_images(args: argparse.Namespace, cfg: CfgNode, template: JigsawTemplate) -> Tensor:
    """uint8 RGB images, or noise as float32; (N, 3, H, W) of the template's size."""
    size = (template.height, template.width)
    if args.store:
        return rgb_stream(cfg, args.store, args.seed)[range(args.num_images)]["image"]
    if args.images:
        return read_images(args.images, size, args.num_images)
    return random_images(args.num_images, size, args.seed)

"""Effective receptive fields as figures: networks side by side on one colour scale (Fig. 6)."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from tabulate import tabulate
from torch import Tensor

from jigsaw_d2.config import in_features
from jigsaw_d2.data.template import REGIONS, JigsawTemplate
from jigsaw_d2.detection.config import load_detection_config
from jigsaw_d2.io import ConfigError
from jigsaw_d2.modeling import erf
from jigsaw_d2.modeling.erf_probes import fill_between, probe_cells
from jigsaw_d2.visualization import inputs
from jigsaw_d2.visualization.figures import draw_box, save_figure


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
    norm = _shared_norm(density)
    figure = Figure(figsize=(13, 2.6 * len(names) + 0.9), layout="constrained")
    axes = figure.subplots(len(names), 5, squeeze=False, width_ratios=[1, 1, 1, 1, 1.5])
    for row, name in enumerate(names):
        for region, panel in enumerate(axes[row, :4]):
            image = panel.imshow(density[row][region], cmap="inferno", norm=norm)
            for other, box in enumerate(template.boxes):
                style = ("cyan", 2.0, 3) if other == region else ("white", 0.6, 2)
                draw_box(panel, box, style[0], linewidth=style[1], zorder=style[2])
            outside = 1 - float(shares[row][region, region])
            _finish(panel, f"cells of R{region + 1}: {outside:.1%} outside")
        axes[row, 0].set_ylabel(name, fontsize=10)
        _share_table(axes[row, 4], shares[row].cpu().numpy())
    _legend(figure, image, axes[:, :4], title)
    return figure


def _shared_norm(density: Sequence[np.ndarray]) -> PowerNorm:
    return PowerNorm(0.5, vmin=0, vmax=max(1e-12, *(float(each.max()) for each in density)))


def _finish(panel: Axes, title: str) -> None:
    panel.set_title(title, fontsize=9)
    panel.set_xticks([])
    panel.set_yticks([])


def _legend(figure: Figure, image: AxesImage, axes: np.ndarray, title: str) -> None:
    bar = figure.colorbar(image, ax=axes, location="bottom", fraction=0.05, aspect=60)
    bar.set_label("ERF density (1 = spread evenly; square-root colours)", fontsize=9)
    figure.suptitle(title, fontsize=9, wrap=True)


def _density(maps: Tensor) -> np.ndarray:
    """Float (S, H, W) maps, each with mean 1; a dead one stays zero."""
    values = maps.detach().cpu().double().numpy()
    mean = values.mean(axis=(1, 2), keepdims=True)
    return values / np.where(mean > 0, mean, 1)


def _share_table(panel: Axes, shares: np.ndarray) -> None:
    """Where the ERF of each region's cells lies, as numbers."""
    rows = [[f"cells of {r}", *(f"{v:.1%}" for v in row)] for r, row in zip(REGIONS, shares)]
    table = tabulate(rows, ["share in", *REGIONS], colalign=["left", *["right"] * 4])
    panel.text(0.5, 0.5, table, family="monospace", fontsize=8, ha="center", va="center")
    panel.axis("off")


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
    norm = _shared_norm(density)
    rows = len({row for row, _ in cells})
    columns = -(-len(cells) // rows)
    figure = Figure(figsize=(3.0 * columns + 0.6, 3.0 * rows + 1.0), layout="compressed")
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel, (row, column), values in zip(axes.flat, cells, density):
        image = panel.imshow(values, cmap="inferno", norm=norm)
        box = np.array([column, row, column + 1, row + 1]) * stride
        draw_box(panel, box, "cyan")
        _finish(panel, f"cell ({row}, {column})")
    _legend(figure, image, axes, title)
    return figure


def map_size(one_erf: Tensor) -> dict[str, float]:
    """How far one ERF, float (H, W), reaches, in pixels; zeros for a dead one.

    Returns:
        radius_50, radius_90: around its centre of mass, of the circle that holds so much of it.
        side_luo: square root of the number of pixels above 4.55 % of the peak, the measure of Luo
            et al. 2016.
    """
    values = one_erf.detach().cpu().double().numpy()
    total = values.sum()
    if total <= 0:
        return {"radius_50": 0.0, "radius_90": 0.0, "side_luo": 0.0}
    y, x = np.indices(values.shape)
    distance = np.hypot(y - (values * y).sum() / total, x - (values * x).sum() / total).ravel()
    order = np.argsort(distance)
    mass = np.cumsum(values.ravel()[order]) / total
    half, most = distance[order][np.searchsorted(mass, (0.5, 0.9))].tolist()
    side = float(np.sqrt((values > (1 - 0.9545) * values.max()).sum()))
    return {"radius_50": half, "radius_90": most, "side_luo": side}


def run(args: argparse.Namespace) -> list[Path]:
    """Measure each network on the same images, normalised as its config says; draw and write."""
    count = len(args.weights)
    given = (args.config_file, args.feature)
    configs, features = (each * count if len(each) == 1 else each for each in given)
    names = args.names or [Path(weights).name for weights in args.weights]
    if {len(configs), len(features), len(names)} != {count}:
        raise ConfigError(
            f"{count} --weights, {len(args.config_file)} --config-file, {len(args.feature)} "
            f"--feature and {len(args.names)} --names do not go together"
        )
    jobs = []  # one a network and feature
    for config, feature, weights, name in zip(configs, features, args.weights, names):
        levels = [feature] if feature else in_features(load_detection_config(config, args.opts))
        several = len(levels) > 1
        jobs += [(config, p, weights, f"{name} {p}" if several else name, several) for p in levels]
    images, measured, rows = None, [], []
    for config, feature, weights, name, several in jobs:
        options = {"seed": args.seed, "device": args.device}
        network, cfg = inputs.load_network(config, feature, weights, args.opts, **options)
        template = JigsawTemplate(*cfg.INPUT.JIGSAW.TEMPLATE_SIZE, *cfg.INPUT.JIGSAW.TEMPLATE_SPLIT)
        if images is None:
            images = _choose_images(args, cfg, template)
        seen = inputs.normalise(images, cfg) if images.dtype == torch.uint8 else images
        regions = template.cell_regions(network.output_shape()[feature].stride)
        cells = probe_cells(*regions.shape) if several else None
        how = {"cells": cells, "with_maps": True}
        found = erf.measure_erf(network, seen, template, feature, args.grad, **how)
        sums = fill_between(found.region_sums, cells)
        regions = regions.to(sums.device)
        shares = erf.region_shares(sums, regions).cpu()
        measured.append((found.region_maps, shares))
        outside = erf.outside_shares(sums, regions).tolist()
        rows.append({"name": name, "config": config, "weights": weights, "feature": feature})
        rows[-1] |= {"shares": shares.tolist(), "outside": outside}
    definition = erf.DEFINITION.format(grad=erf.GRAD_WORDS[args.grad], images=len(images))
    figure = erf_figure([row["name"] for row in rows], *zip(*measured), template, definition)
    numbers = Path(args.output).with_suffix(".json")
    written = [save_figure(figure, args.output), numbers]
    numbers.write_text(json.dumps({"definition": definition, "networks": rows}, indent=1) + "\n")
    return written


def _choose_images(args: argparse.Namespace, cfg: CfgNode, template: JigsawTemplate) -> Tensor:
    """uint8 RGB images, or noise as float32; (N, 3, H, W) of the template's size."""
    size = (template.height, template.width)
    if args.store:
        return inputs.rgb_stream(cfg, args.store, args.seed)[range(args.num_images)]["image"]
    if args.images:
        return inputs.read_images(args.images, size, args.num_images)
    channels = len(cfg.MODEL.PIXEL_MEAN)
    return inputs.random_images(args.num_images, size, args.seed, channels)

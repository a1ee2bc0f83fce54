"""Soft labels and losses of one Jigsaw image, cell by cell (Fig. 5), of each classified feature."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from jigsaw_d2.checkpoint.weight_files import read_weights
from jigsaw_d2.config import get_jigsaw_cfg, resolve_norm
from jigsaw_d2.data.arrays import show
from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.data.template import REGIONS, JigsawTemplate
from jigsaw_d2.io import ConfigError
from jigsaw_d2.modeling import losses
from jigsaw_d2.modeling.backbones import unknown_explained
from jigsaw_d2.modeling.meta_arch import JigsawPretrainer
from jigsaw_d2.visualization.figures import draw_box, save_figure
from jigsaw_d2.visualization.inputs import default_device, normalise, rgb_stream

# More cells than these have no room for their values.
MOST_NUMBERS = 200


def labels_figure(
    image: Tensor,
    names: Sequence[str],
    weights: Tensor,
    loss_map: Tensor,
    cell_regions: Tensor,
    template: JigsawTemplate,
) -> Figure:
    """Fig. 5: the image, the weight of each of its four labels in every cell, the loss map.

    Args:
        image: uint8 (3, H, W) RGB.
        names: of the four classes, R1..R4.
        weights: float (S, h, w) of Eq. 2, drawn on one scale from 0 to 1.
        loss_map: float (h, w), cross-entropy of each cell with its soft label.
        cell_regions: int64 (h, w); the regions' mean losses stand above the map.
        template: its regions are outlined.
    """
    figure = Figure(figsize=(19, 3.9), layout="constrained")
    panels = figure.subplots(1, 6)
    panels[0].imshow(show(image.permute(1, 2, 0).numpy()))
    panels[0].set_title("\n".join(f"{r}: {name}" for r, name in zip(REGIONS, names)), fontsize=9)
    for r in range(losses.NUM_REGIONS):
        drawn = _draw_cells(panels[1 + r], weights[r].numpy(), template, 1.0, "viridis")
        panels[1 + r].set_title(f"w{r + 1}: weight of {names[r]}", fontsize=9)
    bar = {"location": "bottom", "fraction": 0.05}
    figure.colorbar(drawn, ax=panels[1:5], label="label weight", **bar)
    top = max(float(loss_map.max()), 1e-12)
    drawn = _draw_cells(panels[5], loss_map.numpy(), template, top, "magma")
    figure.colorbar(drawn, ax=panels[5], label="cross-entropy, nats", **bar)
    means = losses.region_means(loss_map, cell_regions)
    per_region = "  ".join(f"{r} {mean:.2f}" for r, mean in zip(REGIONS, means.tolist()))
    panels[5].set_title(f"loss {means.mean():.3f}, mean of\n{per_region}", fontsize=9)
    for panel in panels:
        for box in template.boxes.tolist():
            draw_box(panel, box, "red", linewidth=1.5)
        panel.set_xticks([])
        panel.set_yticks([])
    return figure


def _draw_cells(
    panel: Axes, values: np.ndarray, template: JigsawTemplate, top: float, colours: str
) -> AxesImage:
    """Cells over the canvas on a scale from 0 to ``top``; if they are few, with their numbers."""
    extent = (-0.5, template.width - 0.5, template.height - 0.5, -0.5)
    drawn = panel.imshow(values, vmin=0, vmax=top, extent=extent, cmap=colours)
    height, width = template.height / values.shape[0], template.width / values.shape[1]
    for (row, column), value in np.ndenumerate(values) if values.size <= MOST_NUMBERS else ():
        x, y = (column + 0.5) * width - 0.5, (row + 0.5) * height - 0.5
        colour = "black" if value > 0.6 * top else "white"
        panel.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    return drawn


def run(args: argparse.Namespace) -> list[Path]:
    """One figure a position and feature."""
    model, cfg = load_pretrainer(args.config_file, args.weights, args.opts, args.device)
    names = [*SampleStore(list(args.store)).categories, "background"]
    if len(names) != model.num_classes + 1:
        raise ConfigError(
            f"{args.weights} knows {model.num_classes} classes, {', '.join(args.store)} has "
            f"{len(names) - 1}; give the store that it was trained on"
        )
    stream = rgb_stream(cfg, args.store, args.seed)
    written = []
    for position in args.position:
        path = Path(args.output)
        if len(args.position) > 1:
            path = path.with_stem(f"{path.stem}-{position}")
        batch = stream[range(position, position + 1)]
        loss_maps = cell_losses(model, normalise(batch["image"], cfg), batch["gt_classes"][0])
        shown = [names[c] for c in batch["gt_classes"][0].tolist()]
        for name, level in model.levels.items():
            maps = (level.erf_weights.cpu(), loss_maps[name].cpu(), level.cell_regions.cpu())
            figure = labels_figure(batch["image"][0], shown, *maps, model.template)
            ending = f"-{name}" if len(loss_maps) > 1 else ""
            written.append(save_figure(figure, path.with_stem(path.stem + ending)))
    return written


@torch.no_grad()
def cell_losses(model: JigsawPretrainer, image: Tensor, gt_classes: Tensor) -> dict[str, Tensor]:
    """Float32 (h, w) by feature: cross-entropy of every cell of one normalised image (1, 3, H, W).

    ``gt_classes``: int64 (S,).
    """
    classes, levels = gt_classes[None].to(model.device), model.levels
    maps = {}
    for name, logits in model.cell_logits(image.to(model.device)).items():
        labels = losses.soft_labels(levels[name].erf_weights, classes, logits.shape[1])
        maps[name] = -(labels * logits.float().log_softmax(dim=1)).sum(dim=1)[0]
    return maps


def load_pretrainer(
    config_file: str, weights: str, overrides: Sequence[str] = (), device: str = "cpu"
) -> tuple[JigsawPretrainer, CfgNode]:
    """The whole pre-training network from a checkpoint, in evaluation mode.

    Raises:
        ConfigError: the file holds no such network, or another one than the config's.
    """
    data = read_weights(weights)
    state = data.get("model") if isinstance(data, Mapping) else None
    found = isinstance(state, Mapping) and [n for n in state if n.startswith("classifier.")]
    if not found:
        raise ConfigError(f"{weights} is no pre-training checkpoint; labels need its classifier")
    cfg = get_jigsaw_cfg(config_file, list(overrides))
    cfg.MODEL.DEVICE = device or default_device()
    for part in ("RESNETS", "FPN"):
        cfg.MODEL[part].NORM = resolve_norm(cfg, 1, part)
    cfg.MODEL.JIGSAW.NUM_CLASSES = len(state[found[0]]) - 1
    with unknown_explained(cfg):
        model = build_model(cfg)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise ConfigError(f"{weights} does not fit {config_file}: {reason}") from None
    return model.eval(), cfg

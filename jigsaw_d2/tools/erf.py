"""Effective receptive field of any Detectron2 backbone: figure, numbers and, if asked, the maps.

Works on any Detectron2 config, with or without weights, on noise or on images, and needs nothing
of the pre-training.
"""

import argparse
import json
import sys
from pathlib import Path

from tabulate import tabulate

from jigsaw_d2.io import ConfigError, write_text
from jigsaw_d2.tools.arguments import add_opts, add_register, add_trust, import_registered


def build_parser() -> argparse.ArgumentParser:
    """Arguments of the command."""
    parser = argparse.ArgumentParser(prog="python -m jigsaw_d2 erf", description=__doc__)
    add = parser.add_argument
    text = "a path, a config of ours, or a name in Detectron2's model zoo"
    text += ", e.g. COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
    add("--config-file", required=True, help=text)
    add("--feature", required=True, help="output of the backbone, e.g. res5 or p4")
    add("--output", required=True, help="folder for erf.png, erf.json and erf.npz")
    add("--weights", default="random", help='a file of weights, or "random" (default)')
    add("--images", nargs="+", default=[], help="image files or folders; default: noise")
    add("--num-images", type=int, default=4, help="most images to average over (default 4)")
    add("--size", type=int, nargs=2, default=[512, 512], metavar=("H", "W"), help="input, pixels")
    text = "3x3 cells over the map (default), or one"
    add("--cells", choices=("grid", "centre"), default="grid", help=text)
    text = "sign of gradients: abs counts both"
    add("--grad", choices=("abs", "relu"), default="abs", help=text)
    add("--seed", type=int, default=0, help="of random weights and noise")
    add("--device", default="", help="cpu or cuda; default: a GPU where there is one")
    add("--save-maps", action="store_true", help="write the maps too, as erf.npz")
    add_trust(parser)
    add_register(parser)
    add_opts(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure, write, and say in a few lines what was found."""
    args = build_parser().parse_args(argv)
    if args.num_images < 1 or min(args.size) < 1:
        raise ConfigError("--num-images and --size must be positive")
    import numpy as np
    import torch

    from jigsaw_d2.modeling.erf import DEFINITION, GRAD_WORDS, erf_maps, measuring
    from jigsaw_d2.visualization import inputs
    from jigsaw_d2.visualization.erf import cell_figure, map_size
    from jigsaw_d2.visualization.figures import save_figure

    import_registered(args.register)
    network, cfg = inputs.load_network(
        *(args.config_file, args.feature, args.weights, args.opts),
        seed=args.seed,
        device=args.device,
        trust=args.trust,
    )
    size = tuple(args.size)
    divisor = getattr(network, "size_divisibility", 0)
    if divisor > 1 and (size[0] % divisor or size[1] % divisor):
        raise ConfigError(f"--size {size[0]} {size[1]}: use multiples of {divisor}")
    if args.images:
        images = inputs.normalise(inputs.read_images(args.images, size, args.num_images), cfg)
    else:
        channels = len(cfg.MODEL.PIXEL_MEAN)
        images = inputs.random_images(args.num_images, size, args.seed, channels)
    with measuring(network), torch.no_grad():  # strides alone do not tell about padding
        h, w = network(images[:1].to(cfg.MODEL.DEVICE))[args.feature].shape[2:]
    rows, columns = sorted({0, h // 2, h - 1}), sorted({0, w // 2, w - 1})
    if args.cells == "centre":
        rows, columns = [h // 2], [w // 2]
    cells = [(row, column) for row in rows for column in columns]
    maps = erf_maps(network, images, cells, args.feature, args.grad).cpu()
    report = {
        "definition": DEFINITION.format(grad=GRAD_WORDS[args.grad], images=len(images)),
        "config": args.config_file,
        "weights": args.weights,
        "input": args.images or "standard normal noise",
        "input_size": list(size),
        "feature": args.feature,
        "feature_size": [h, w],
        "stride": network.output_shape()[args.feature].stride,
        "cells": [{"cell": list(cell), **map_size(erf)} for cell, erf in zip(cells, maps)],
    }
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    figure = cell_figure(maps, cells, report["stride"], title=report["definition"])
    written = [save_figure(figure, folder / "erf.png"), folder / "erf.json"]
    write_text(written[1], json.dumps(report, indent=1) + "\n")
    if args.save_maps:
        written.append(folder / "erf.npz")
        np.savez_compressed(written[2], maps=maps.numpy(), cells=np.array(cells))
    head = ["cell", "radius of half the ERF, px", "of 90 %, px"]
    head.append("side of pixels above 4.55 % of the peak, px")
    table = [[str(tuple(row.pop("cell"))), *row.values()] for row in report["cells"]]
    words = f"{report['definition']}\n{args.feature}: {h}x{w} cells, stride {report['stride']}"
    lines = [*map(str, written), words, tabulate(table, head, floatfmt=".1f")]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0

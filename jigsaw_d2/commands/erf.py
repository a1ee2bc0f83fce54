"""Effective receptive field of any Detectron2 backbone: figure, numbers and, if asked, the maps.

Works on any Detectron2 config, with or without weights, on noise or on images, and needs nothing
of the pre-training.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from jigsaw_d2.erf import DEFINITION, GRAD_WORDS, GRADS, erf_maps
from jigsaw_d2.erf_weights import ErfError
from jigsaw_d2.training.erf_inputs import (
    RANDOM,
    default_device,
    load_network,
    normalise,
    random_images,
    read_images,
)
from jigsaw_d2.training.network_state import measuring
from jigsaw_d2.visualization.erf import cell_figure, map_size, save_figure

CELLS = ("grid", "centre")


def build_parser() -> argparse.ArgumentParser:
    """See ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m jigsaw_d2 erf", description=__doc__)
    add = parser.add_argument
    add(
        "--config-file",
        required=True,
        help="a path, a config of ours, or a name in Detectron2's model zoo, "
        "e.g. COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    )
    add("--feature", required=True, help="output of the backbone, e.g. res5 or p4")
    add("--output", required=True, help="folder for erf.png, erf.json and erf.npz")
    add("--weights", default=RANDOM, help='a file of weights, or "random" (default)')
    add("--images", nargs="+", default=[], help="image files or folders; default: noise")
    add("--num-images", type=int, default=4, help="most images to average over (default 4)")
    add("--size", type=int, nargs=2, default=[512, 512], metavar=("H", "W"), help="input, pixels")
    add("--cells", choices=CELLS, default="grid", help="3x3 cells over the map (default), or one")
    add("--grad", choices=sorted(GRADS), default="abs", help="sign of gradients: abs counts both")
    add("--seed", type=int, default=0, help="of random weights and noise")
    add("--device", default=default_device(), help="cpu or cuda")
    add("--save-maps", action="store_true", help="write the maps too, as erf.npz")
    # An option, as in Detectron2's demo: after a list of files, bare words would join the list.
    add(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure, write, and say in a few lines what was found."""
    args = build_parser().parse_args(argv)
    if args.num_images < 1 or min(args.size) < 1:
        raise ErfError("--num-images and --size must be positive")
    network, cfg = load_network(
        args.config_file,
        args.feature,
        args.weights,
        args.opts,
        seed=args.seed,
        device=args.device,
    )
    size = tuple(args.size)
    if args.images:
        images = normalise(read_images(args.images, size, args.num_images), cfg)
    else:
        images = random_images(args.num_images, size, args.seed)
    shape = _feature_shape(network, images, args.feature)
    cells = _choose_cells(shape, args.cells)
    maps = erf_maps(network, images, cells, args.feature, args.grad).cpu()
    definition = DEFINITION.format(grad=GRAD_WORDS[args.grad], images=len(images))
    report = {
        "definition": definition,
        "config": args.config_file,
        "weights": args.weights,
        "input": args.images or "standard normal noise",
        "input_size": list(size),
        "feature": args.feature,
        "feature_size": list(shape),
        "stride": network.output_shape()[args.feature].stride,
        "cells": [{"cell": list(cell), **map_size(erf)} for cell, erf in zip(cells, maps)],
    }
    for path in _write(Path(args.output), report, maps, cells, args.save_maps):
        print(path)
    _print_report(report)
    return 0


def _feature_shape(network: torch.nn.Module, images: torch.Tensor, feature: str) -> tuple[int, int]:
    """(h, w) of the feature, by one forward pass: strides alone do not tell about padding."""
    device = next(network.parameters()).device
    divisor = getattr(network, "size_divisibility", 0)
    if divisor > 1 and any(size % divisor for size in images.shape[2:]):
        raise ErfError(f"--size {images.shape[2]} {images.shape[3]}: use multiples of {divisor}")
    with measuring(network), torch.no_grad():
        return tuple(network(images[:1].to(device))[feature].shape[2:])


def _choose_cells(shape: tuple[int, int], choice: str) -> list[tuple[int, int]]:
    h, w = shape
    if choice == "centre":
        return [(h // 2, w // 2)]
    rows, columns = sorted({0, h // 2, h - 1}), sorted({0, w // 2, w - 1})
    return [(row, column) for row in rows for column in columns]


def _write(
    folder: Path, report: dict, maps: torch.Tensor, cells: list[tuple[int, int]], save_maps: bool
) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    figure = cell_figure(maps, cells, report["stride"], title=report["definition"])
    written = [save_figure(figure, folder / "erf.png"), folder / "erf.json"]
    written[1].write_text(json.dumps(report, indent=1) + "\n")
    if save_maps:
        written.append(folder / "erf.npz")
        np.savez_compressed(written[2], maps=maps.numpy(), cells=np.array(cells))
    return written


def _print_report(report: dict) -> None:
    print(report["definition"])
    h, w = report["feature_size"]
    print(f"{report['feature']}: {h}x{w} cells, stride {report['stride']}")
    print("cell        radius of half the ERF   of 90 %   side of pixels above 4.55 % of the peak")
    for row in report["cells"]:
        print(
            f"({row['cell'][0]:3d},{row['cell'][1]:3d})   {row['radius_50']:10.1f} px"
            f"   {row['radius_90']:14.1f} px   {row['side_luo']:10.1f} px"
        )

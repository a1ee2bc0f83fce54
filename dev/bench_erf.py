"""Cost of one ERF refresh, counted and measured, in training iterations of the paper's batch.

    python dev/bench_erf.py [--depths 18 50] [--images 8] [--batch 64] [--repeats 2] [--pyramid]

The paper's proportion, 64 images for a batch of 512, is kept at a size that suits the machine. A
refresh and an iteration (forward, backward, SGD step) of the same network are interleaved in one
process, in float32, on one core; medians of CPU seconds, which other work on the machine leaves be.
The batch is computed in parts of ``--images``, so that both sides see tensors of the same size.
Counted: a refresh runs every image forward once and backward to the input once a cell, a training
iteration runs every image forward once and backward twice as much. ``--pyramid``: of p3 to p5,
which share the images out and of which 49 cells at most are probed.
"""

import argparse
import statistics
import time

import torch

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.cost import TRAIN_FORWARDS
from jigsaw_d2.modeling.erf import measure_erf
from jigsaw_d2.modeling.erf_probes import probe_cells
from jigsaw_d2.modeling.meta_arch import JigsawPretrainer

PAPER_IMAGES, PAPER_BATCH, PAPER_PERIOD = 64, 512, 5000


def build(depth: int, pyramid: bool) -> JigsawPretrainer:
    """The pre-training network in float32, channels last."""
    width = {18: 64, 34: 64}.get(depth, 256)
    keys = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.NORM", "BN", "MODEL.JIGSAW.NUM_CLASSES", 80]
    keys += ["MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.RES2_OUT_CHANNELS", width]
    config = "jigsaw_R_50_FPN.yaml" if pyramid else "Base-JigsawPretrain.yaml"
    cfg = get_jigsaw_cfg(config, [*keys, "MODEL.JIGSAW.CHANNELS_LAST", True])
    return JigsawPretrainer(cfg).train()


def train_seconds(
    model: JigsawPretrainer, optimizer: torch.optim.SGD, batch: dict, part: int
) -> float:
    """One iteration, ``part`` images at a time."""
    start = time.process_time()
    for images, gt_classes in zip(batch["image"].split(part), batch["gt_classes"].split(part)):
        model({"image": images, "gt_classes": gt_classes})["loss_jigsaw"].backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - start


def refresh_seconds(model: JigsawPretrainer, images: torch.Tensor) -> tuple[float, int]:
    """One measurement, with the maps that TensorBoard shows, and its passes, all images together.

    As ``ErfRefreshHook`` makes it.
    """
    start, passes, several = time.process_time(), 0, len(model.levels) > 1
    for part, (name, level) in zip(images.chunk(len(model.levels)), model.levels.items()):
        cells = probe_cells(*level.cell_regions.shape) if several else None
        how = {"cells": cells, "with_maps": True}
        measure_erf(model.backbone, model.preprocess(part), model.template, name, **how)
        passes += len(part) * (1 + len(cells or level.cell_regions.flatten()))
    return time.process_time() - start, passes


def compare(depth: int, args: argparse.Namespace) -> None:
    """Print counted and measured cost for one network."""
    model = build(depth, args.pyramid)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    rng = torch.Generator().manual_seed(0)
    size = (3, model.template.height, model.template.width)
    images = torch.randint(0, 256, (args.batch, *size), dtype=torch.uint8, generator=rng)
    batch = {"image": images, "gt_classes": torch.randint(0, 81, (args.batch, 4), generator=rng)}
    train_seconds(model, optimizer, batch, args.images)  # warms up
    steps, refreshes = [], []
    for _ in range(args.repeats):
        steps.append(train_seconds(model, optimizer, batch, args.images))
        seconds, passes = refresh_seconds(model, images[: args.images])
        refreshes.append(seconds)
    step, refresh = statistics.median(steps), statistics.median(refreshes)
    scale = PAPER_IMAGES / PAPER_BATCH * args.batch / args.images  # 1 in the paper's proportion
    passes = round(PAPER_IMAGES * passes / args.images)
    counted = passes / (PAPER_BATCH * TRAIN_FORWARDS)
    measured = refresh / step * scale
    print(
        f"R{depth}: counted {passes} forward-equivalents, {counted:.2f} iterations; "
        f"measured {refresh:.1f} s for {args.images} images, {step:.1f} s for a step of "
        f"{args.batch}: {measured:.2f} iterations = {measured / PAPER_PERIOD:.3%} of training"
    )


def main() -> None:
    """Compare each network asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[18, 50], help="of the ResNets")
    parser.add_argument("--images", type=int, default=8, help="images of a refresh")
    parser.add_argument("--batch", type=int, default=64, help="images of an iteration")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--pyramid", action="store_true", help="p3 to p5 of a feature pyramid")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for depth in args.depths:
        compare(depth, args)


if __name__ == "__main__":
    main()

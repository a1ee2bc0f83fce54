"""Cost of one ERF refresh, counted and measured, in training iterations of the paper's batch.

    python dev/bench_erf.py [--depths 18 50] [--images 8] [--batch 64] [--repeats 2]

The paper's proportion, 64 images for a batch of 512, is kept at a size that suits the machine. A
refresh and an iteration (forward, backward, SGD step) of the same network are interleaved in one
process, in float32, on one core; medians of CPU seconds, which other work on the machine leaves be.
The batch is computed in parts of ``--images``, so that both sides see tensors of the same size.
Counted: a refresh runs every image forward once and backward to the input once a cell, a training
iteration runs every image forward once and backward twice as much.
"""

import argparse
import statistics
import time

import torch

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.cost import TRAIN_FORWARDS
from jigsaw_d2.modeling.erf import measure_erf
from jigsaw_d2.modeling.meta_arch import JigsawPretrainer

PAPER_IMAGES, PAPER_BATCH, PAPER_PERIOD = 64, 512, 5000


def build(depth: int) -> JigsawPretrainer:
    """The pre-training network in float32, channels last."""
    width = {18: 64, 34: 64}.get(depth, 256)
    keys = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.NORM", "BN", "MODEL.JIGSAW.NUM_CLASSES", 80]
    keys += ["MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.RES2_OUT_CHANNELS", width]
    cfg = get_jigsaw_cfg("Base-JigsawPretrain.yaml", [*keys, "MODEL.JIGSAW.CHANNELS_LAST", True])
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


def refresh_seconds(model: JigsawPretrainer, images: torch.Tensor) -> float:
    """One measurement, with the maps that TensorBoard shows."""
    start = time.process_time()
    measure_erf(model.backbone, model.preprocess(images), model.template, with_maps=True)
    return time.process_time() - start


def compare(depth: int, args: argparse.Namespace) -> None:
    """Print counted and measured cost for one network."""
    model = build(depth)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    rng = torch.Generator().manual_seed(0)
    size = (3, model.template.height, model.template.width)
    images = torch.randint(0, 256, (args.batch, *size), dtype=torch.uint8, generator=rng)
    batch = {"image": images, "gt_classes": torch.randint(0, 81, (args.batch, 4), generator=rng)}
    train_seconds(model, optimizer, batch, args.images)  # warms up
    steps, refreshes = [], []
    for _ in range(args.repeats):
        steps.append(train_seconds(model, optimizer, batch, args.images))
        refreshes.append(refresh_seconds(model, images[: args.images]))
    step, refresh = statistics.median(steps), statistics.median(refreshes)
    scale = PAPER_IMAGES / PAPER_BATCH * args.batch / args.images  # 1 in the paper's proportion
    passes = 1 + model.cell_regions.numel()
    counted = PAPER_IMAGES * passes / (PAPER_BATCH * TRAIN_FORWARDS)
    measured = refresh / step * scale
    print(
        f"R{depth}: counted {PAPER_IMAGES * passes} forward-equivalents, {counted:.2f} iterations; "
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
    args = parser.parse_args()
    torch.set_num_threads(1)
    for depth in args.depths:
        compare(depth, args)


if __name__ == "__main__":
    main()

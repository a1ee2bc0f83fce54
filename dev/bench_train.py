#!/usr/bin/env python
"""How much of the hardware the trainer leaves to the network: images/s, FLOP rate, peak memory.

    bench_train.py --config-file configs/jigsaw_R_50.yaml --store STORE [--memory] KEY VALUE ...

Rows: (a) the bare backbone with a linear classifier, one synthetic tensor on the device, forward +
backward + step; (b) JigsawTrainer on a synthetic loader; (c) JigsawTrainer on the real loader. The
rows take turns, ``--iters`` steps each, so that whatever else the machine does hits all of them;
the ratios are medians over the rounds. ERF refreshes are not in the rows (one in 5,000 steps).
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import nn

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.cost import TRAIN_FORWARDS, device_name
from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.engine.precision import Precision
from jigsaw_d2.engine.trainer import JigsawTrainer

ROWS = {"a": "bare backbone", "b": "trainer, synthetic", "c": "trainer, real loader"}


class Bare(nn.Module):
    """What any training of this backbone must do: pooled features, a linear classifier."""

    def __init__(self, backbone: nn.Module, feature: str, classes: int) -> None:
        super().__init__()
        self.backbone, self.feature = backbone, feature
        self.classifier = nn.Linear(backbone.output_shape()[feature].channels, classes)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        features = self.backbone(images)[self.feature].mean(dim=(2, 3))
        return nn.functional.cross_entropy(self.classifier(features), labels)


class SyntheticTrainer(JigsawTrainer):
    """The same batch for ever, in the memory that a loader would hand it over in."""

    @classmethod
    def build_train_loader(
        cls, cfg: CfgNode, start_iter: int = 0, store: SampleStore | None = None
    ) -> Iterator[dict]:
        size = cfg.SOLVER.IMS_PER_BATCH // cfg.SOLVER.ACCUMULATION_STEPS
        generator = torch.Generator().manual_seed(0)
        height, width = cfg.INPUT.JIGSAW.TEMPLATE_SIZE
        image = torch.randint(256, (size, height, width, 3), generator=generator).to(torch.uint8)
        image = image.permute(0, 3, 1, 2)  # channels innermost, as images are decoded
        classes = torch.randint(cfg.MODEL.JIGSAW.NUM_CLASSES + 1, (size, 4), generator=generator)
        if torch.cuda.is_available():
            image, classes = image.pin_memory(), classes.pin_memory()
        while True:
            yield {"image": image, "gt_classes": classes, "sample_ids": classes, "position": 0}


def bare_steps(cfg: CfgNode) -> Callable[[int], None]:
    """A function that runs n steps of row (a)."""
    model = JigsawTrainer.build_model(cfg)
    device, precision = model.device, Precision.from_config(cfg)
    bare = Bare(model.backbone, cfg.MODEL.JIGSAW.IN_FEATURE, cfg.MODEL.JIGSAW.NUM_CLASSES + 1)
    bare.to(device).train()
    if cfg.MODEL.JIGSAW.COMPILE:
        bare.backbone.compile()
    optimizer, scaler = build_optimizer(cfg, bare), precision.grad_scaler()
    size = cfg.SOLVER.IMS_PER_BATCH // cfg.SOLVER.ACCUMULATION_STEPS
    images = torch.randn(size, 3, *cfg.INPUT.JIGSAW.TEMPLATE_SIZE, device=device)
    images = images.contiguous(memory_format=model.memory_format)
    labels = torch.zeros(size, dtype=torch.int64, device=device)

    def steps(n: int) -> None:
        for _ in range(n):
            optimizer.zero_grad(set_to_none=True)
            for _ in range(cfg.SOLVER.ACCUMULATION_STEPS):
                with precision.autocast():
                    loss = bare(images, labels)
                scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        synchronize()

    return steps


def trainer_steps(trainer: JigsawTrainer) -> Callable[[int], None]:
    """A function that runs n iterations of a trainer, hooks included, as ``train`` would."""
    loader = trainer.build_train_loader(trainer.cfg, store=trainer.store)
    trainer._trainer.feed(loader)
    trainer.iter, storage = 0, EventStorage(0)
    trainer.storage = storage
    trainer.before_train()

    def steps(n: int) -> None:
        with storage:
            for _ in range(n):
                trainer.before_step()
                trainer.run_step()
                trainer.after_step()
                trainer.iter += 1
        synchronize()

    return steps


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def build(row: str, cfg: CfgNode, folder: str) -> tuple[Callable[[int], None], JigsawTrainer]:
    """The steps of a row, and the trainer whose resolved config it uses."""
    cfg = cfg.clone()
    cfg.OUTPUT_DIR = f"{folder}/{row}"
    trainer = (JigsawTrainer if row == "c" else SyntheticTrainer)(cfg)
    return (bare_steps(trainer.cfg) if row == "a" else trainer_steps(trainer)), trainer


def measure_speed(
    built: dict[str, tuple[Callable[[int], None], JigsawTrainer]], rounds: int, iters: int
) -> dict[str, list[float]]:
    """Images per second of each row in each round; the first round warms up and is dropped."""
    found: dict[str, list[float]] = {row: [] for row in ROWS}
    for number in range(rounds + 1):
        for row, (steps, trainer) in built.items():
            start = time.perf_counter()
            steps(iters)
            seconds = time.perf_counter() - start
            if number:
                found[row].append(iters * trainer.cfg.SOLVER.IMS_PER_BATCH / seconds)
    storage = built["c"][1].storage
    found["wait"] = [v for v, _ in storage.history("data_wait_share").values()[iters:]]
    return found


def matrix_ceiling(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of the best of ten large matrix products, in the precision of the run."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        synchronize()
        start = time.perf_counter()
        a @ b
        synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory(row: str, cfg: CfgNode, iters: int, folder: str) -> float:
    """MiB at most after ``iters`` steps of one row in this process, which does nothing else."""
    steps, _ = build(row, cfg, folder)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    steps(iters)
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", default="jigsaw_R_50.yaml", help="network and precision")
    parser.add_argument("--store", required=True, help="sample store of row (c)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds that count")
    parser.add_argument("--iters", type=int, default=10, help="steps of each row per round")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of speed")
    parser.add_argument("--row", choices=ROWS, help="(internal) memory of one row, as JSON")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs")
    return parser


def bench_cfg(args: argparse.Namespace) -> CfgNode:
    """The run's config without what happens once in thousands of steps."""
    cfg = get_jigsaw_cfg(args.config_file, args.opts)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (args.store,), ()
    cfg.SOLVER.REFERENCE_BATCH_SIZE, cfg.SOLVER.MAX_ITER = 0, 10**9
    cfg.SOLVER.CHECKPOINT_PERIOD = cfg.TEST.EVAL_PERIOD = 0
    cfg.MODEL.JIGSAW.ERF.FIRST_ITER = 10**9
    cfg.SEED = 0
    return cfg


def print_speed(args: argparse.Namespace, cfg: CfgNode, folder: str) -> None:
    built = {row: build(row, cfg, folder) for row in ROWS}
    found = measure_speed(built, args.rounds, args.iters)
    cfg = built["a"][1].cfg
    device = torch.device(cfg.MODEL.DEVICE)
    macs = built["a"][1]._macs
    dtype = Precision.from_config(cfg).dtype or torch.float32
    ceiling = matrix_ceiling(device, dtype, 16384 if device.type == "cuda" else 2048)
    rows = [["row", "images/s", "least", "most", "TFLOP/s", "of ceiling", "ratio"]]
    for row, name in ROWS.items():
        speed = statistics.median(found[row])
        rate = speed * 2 * TRAIN_FORWARDS * macs
        before = {"b": "a", "c": "b"}.get(row)
        ratio = ""
        if before:
            pairs = zip(found[row], found[before])
            ratio = f"{row}/{before} {statistics.median(x / y for x, y in pairs):.3f}"
        extremes = [f"{min(found[row]):.1f}", f"{max(found[row]):.1f}"]
        flops = [f"{rate / 1e12:.2f}", f"{rate / ceiling:.1%}"]
        rows.append([f"({row}) {name}", f"{speed:.1f}", *extremes, *flops, ratio])
    print(f"{device_name(device)}; {args.config_file}, batch {cfg.SOLVER.IMS_PER_BATCH}, {dtype}")
    print(
        f"{args.rounds} rounds of {args.iters} steps; matrix ceiling {ceiling / 1e12:.2f} TFLOP/s"
    )
    print(tabulate(rows, "firstrow"))
    print(f"data wait of (c): {statistics.mean(found['wait']):.1%} of the step")


def print_memory(args: argparse.Namespace, argv: list[str]) -> None:
    """Each row in a process of its own."""
    rows, peaks = [["row", "peak MiB", "of (a)"]], {}
    for row, name in ROWS.items():
        command = [sys.executable, __file__, "--row", row, *argv]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        peaks[row] = json.loads(out.splitlines()[-1])
        rows.append([f"({row}) {name}", f"{peaks[row]:.0f}", f"{peaks[row] / peaks['a']:.3f}"])
    print(tabulate(rows, "firstrow"))


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    cfg = bench_cfg(args)
    with tempfile.TemporaryDirectory() as folder:
        if args.row:
            print(json.dumps(peak_memory(args.row, cfg, args.iters, folder)))
        elif args.memory:
            print_memory(args, argv)
        else:
            print_speed(args, cfg, folder)


if __name__ == "__main__":
    main()

"""How fast Jigsaw images are made: python dev/bench_input.py --json A.json --images DIR

All rows show the same crops, on one core, in turns within one run. Rates are medians over turns,
by the processor time that the work took, so that other work on the machine disturbs little; those
of worker processes are by the clock. "Ordinary JPEG" bytes are the crops as any dataset stores
them. The "JPEG store" holds JPEGs with restart intervals, of which a window decodes alone; the
"default store" is what extraction writes unless told otherwise: up to 1 GiB uncompressed. Worker
processes and memory are those of the JPEG store.
"""

import argparse
import io
import itertools
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from PIL import Image
from torchvision import transforms

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.data.build import build_jigsaw_train_loader
from jigsaw_d2.data.extraction import ExtractionOptions, extract_samples
from jigsaw_d2.data.sources import CocoSource
from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.data.template import JigsawTemplate

BATCH = 32
# Where each of the draws S, S, T, W goes in the plain loop, which does not sort by area.
PLAIN_REGIONS = (0, 3, 2, 1)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", required=True, help="annotations, COCO format")
    parser.add_argument("--images", required=True, help="folder of the images")
    parser.add_argument("--min-side", type=float, default=2, help="px; leave smaller boxes out")
    parser.add_argument("--turns", type=int, default=15, help="turns of every row")
    parser.add_argument("--batches", type=int, default=4, help=f"batches of {BATCH} images a turn")
    parser.add_argument(
        "--memory-batches", type=int, default=0, help="batches of 4 to watch memory over"
    )
    parser.add_argument("--workers", action="store_true", help="also 1 and 2 worker processes")
    return parser


def make_stores(args: argparse.Namespace, folder: Path) -> dict[str, SampleStore]:
    """The same samples as "JPEG store", "default store", and "plain": ordinary JPEGs."""
    huge = JigsawTemplate(1 << 14, 1 << 14, 1 << 13, 1 << 13)  # shows every sample whole
    stores = {}
    for name, template, encoding in (
        ("JPEG store", JigsawTemplate(), "jpeg"),
        ("default store", JigsawTemplate(), "auto"),
        ("plain", huge, "jpeg"),
    ):
        options = ExtractionOptions(
            template=template, encoding=encoding, min_side=args.min_side, workers=0
        )
        extract_samples(CocoSource(args.json, args.images), str(folder / name), options)
        stores[name] = SampleStore(folder / name)
        if not np.array_equal(stores[name].boxes, stores["JPEG store"].boxes):
            raise AssertionError("the stores hold different crops")
    return stores


def decode_four(crops: list[np.ndarray]) -> None:
    """The ceiling of any pipeline that decodes whole crops."""
    for crop in crops:
        cv2.imdecode(crop, cv2.IMREAD_COLOR)


def plain_jigsaw(crops: list[np.ndarray], rng: np.random.Generator) -> torch.Tensor:
    """A straightforward OpenCV loop: decode, resize, flip, crop or pad, stitch, to CHW."""
    canvas = np.zeros((224, 224, 3), np.uint8)
    boxes = JigsawTemplate().boxes
    for region, crop in zip(PLAIN_REGIONS, crops):
        x0, y0, x1, y1 = boxes[region]
        image = cv2.cvtColor(cv2.imdecode(crop, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        scale = rng.uniform(0.8, 1.5)
        image = cv2.resize(image, None, fx=scale, fy=scale)
        if rng.random() < 0.5:
            image = image[:, ::-1]
        height, width = image.shape[:2]
        high, wide = min(height, y1 - y0), min(width, x1 - x0)
        top, left = rng.integers(0, height - high + 1), rng.integers(0, width - wide + 1)
        y, x = y0 + (y1 - y0 - high) // 2, x0 + (x1 - x0 - wide) // 2
        canvas[y : y + high, x : x + wide] = image[top : top + high, left : left + wide]
    return torch.from_numpy(np.ascontiguousarray(canvas.transpose(2, 0, 1)))


def imagenet_recipe() -> Callable[[bytes], torch.Tensor]:
    """torchvision's training transform; one crop makes one image."""
    return transforms.Compose(
        [
            lambda data: Image.open(io.BytesIO(data)).convert("RGB"),
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )


def jigsaw_cfg(store: SampleStore, workers: int) -> CfgNode:
    return get_jigsaw_cfg(
        overrides=[
            *("DATASETS.TRAIN", (str(store.paths[0]),)),
            *("SOLVER.IMS_PER_BATCH", BATCH, "DATALOADER.NUM_WORKERS", workers),
            *("INPUT.FORMAT", "RGB", "SEED", 0),
        ]
    )


def our_rows(
    store: SampleStore, quads: list[np.ndarray], turn: Callable, batches: int, label: str
) -> dict[str, Callable[[int], None]]:
    """The mapper, given its crops ``quads``, and the whole path over one store."""
    loader = build_jigsaw_train_loader(jigsaw_cfg(store, 0), store=store)
    mapper, stream = loader.dataset.mapper, iter(loader)

    return {
        f"our mapper ({label})": turn(lambda p: mapper({"position": p, "sample_ids": quads[p]})),
        f"our DataLoader path to the collated batch ({label})": lambda _: list(
            itertools.islice(stream, batches)
        ),
    }


def make_rows(
    stores: dict[str, SampleStore], turns: int, batches: int
) -> dict[str, Callable[[int], None]]:
    """Row name -> function that makes the images of turn ``t``, 0 <= t <= turns."""
    count, plain, default = batches * BATCH, stores["plain"], stores["default store"]
    encoding = default.header["options"]["encoding"]
    sampler = build_jigsaw_train_loader(jigsaw_cfg(plain, 0), store=plain).dataset.sampler
    recipe = imagenet_recipe()
    rng = np.random.default_rng(0)
    # Rows that are not ours pay neither for choosing nor for reading their crops.
    quads = [sampler.quadruple(p) for p in range((turns + 1) * count)]
    encoded = [np.frombuffer(plain[i], np.uint8) for i in range(len(plain))]

    def turn(function: Callable[[int], object]) -> Callable[[int], None]:
        def run(t: int) -> None:
            for position in range(t * count, (t + 1) * count):
                function(position)

        return run

    return {
        "decode four crops, OpenCV, nothing else (ordinary JPEG)": turn(
            lambda p: decode_four([encoded[i] for i in quads[p]])
        ),
        "plain OpenCV jigsaw loop (ordinary JPEG)": turn(
            lambda p: plain_jigsaw([encoded[i] for i in quads[p]], rng)
        ),
        **our_rows(stores["JPEG store"], quads, turn, batches, "JPEG store"),
        **our_rows(default, quads, turn, batches, f"default store: {encoding}"),
        "torchvision ImageNet recipe, one crop an image (ordinary JPEG)": turn(
            lambda p: recipe(encoded[quads[p][p % 4]].tobytes())
        ),
    }


def measure(rows: dict[str, Callable[[int], None]], turns: int, count: int) -> np.ndarray:
    """Images per processor second, (rows, turns); one more turn, first, is thrown away."""
    rates = np.zeros((len(rows), turns))
    for t in range(-1, turns):
        for row, function in enumerate(rows.values()):
            start = time.process_time()
            function(t + 1)
            if t >= 0:
                rates[row, t] = count / (time.process_time() - start)
    return rates


def measure_workers(store: SampleStore, turns: int, batches: int) -> dict[int, np.ndarray]:
    """Images per second that leave 1 and 2 worker processes, in turns."""
    streams = {
        n: iter(build_jigsaw_train_loader(jigsaw_cfg(store, n), store=store)) for n in (1, 2)
    }
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(turns):
        for workers, stream in streams.items():
            # What was prefetched while the other ran is drained first.
            for _ in range(4 * workers):
                next(stream)
            start = time.perf_counter()
            for _ in range(batches * 4):
                next(stream)
            rates[workers].append(batches * 4 * BATCH / (time.perf_counter() - start))
    return {n: np.array(r) for n, r in rates.items()}


def watch_memory(store: SampleStore, batches: int) -> list[tuple[int, float]]:
    """(batches of 4 made, MiB of peak resident memory) at a tenth, half and all of ``batches``."""
    cfg = jigsaw_cfg(store, 0)
    cfg.SOLVER.IMS_PER_BATCH = 4
    stream, seen = iter(build_jigsaw_train_loader(cfg, store=store)), []
    for number in range(1, batches + 1):
        next(stream)
        if number in (batches // 10, batches // 2, batches):
            seen.append((number, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
    return seen


def main() -> None:
    args = build_parser().parse_args()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        stores = make_stores(args, Path(folder))
        store = stores["JPEG store"]
        sizes, groups = store.sizes.prod(axis=1) / 1e3, store.groups
        drawn = np.mean([sizes[groups == g].mean() for g in (0, 0, 1, 2)])
        print(f"{len(store)} crops, mean {sizes.mean():.1f} kpx (as drawn: {drawn:.1f} kpx)")
        rows = make_rows(stores, args.turns, args.batches)
        rates = measure(rows, args.turns, args.batches * BATCH)
        for name, rate in zip(rows, rates):
            ratio = np.median(rate / rates[0])
            print(f"{np.median(rate):8.0f} img/s  {ratio:5.2f} x  {name}")
        if args.workers:
            workers = measure_workers(store, args.turns, args.batches)
            gain = np.median(workers[2] / workers[1])
            for n, rate in workers.items():
                print(f"{np.median(rate):8.0f} img/s  {n} worker process(es)")
            print(f"2 workers against 1: {gain:.2f} x")
        for number, memory in (
            watch_memory(store, args.memory_batches) if args.memory_batches else ()
        ):
            print(f"{memory:8.1f} MiB resident at most after {number} batches")


if __name__ == "__main__":
    main()

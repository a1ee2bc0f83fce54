"""Opening, memory and read rate of a store of a million samples, and the overhead of the format.

    python dev/bench_store.py [--samples 1000000]

The large store is made up: a full index over one small shard, whose samples repeat. The overhead is
that of samples of COCO's sizes drawn from a seed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np

from jigsaw_d2.data.extraction import needs_windows, shown_sizes
from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.data.store_format import INDEX_NAME, fingerprint, read_header
from jigsaw_d2.data.store_writer import StoreWriter
from jigsaw_d2.data.template import JigsawTemplate

OPEN_SCRIPT = """
import sys, time
from jigsaw_d2.data.store import SampleStore
started = time.perf_counter()
store = SampleStore(sys.argv[1])
store[len(store) - 1]
print(time.perf_counter() - started)
"""


def draw_store(path: Path, count: int = 400, windows: bool = True) -> SampleStore:
    """Samples whose JPEGs are 15 kB on average, as COCO's: the log of their area is normal."""
    rng = np.random.default_rng(0)
    shown = shown_sizes(JigsawTemplate(), 0.8)
    with StoreWriter(path, ["thing"]) as writer:
        for n in range(count):
            side = np.clip(np.exp(rng.normal(4.45, 0.86)), 8, 600)
            aspect = np.exp(rng.normal(0, 0.5))
            width, height = int(side * aspect**0.5) + 1, int(side / aspect**0.5) + 1
            layers = [
                cv2.resize(rng.random((h, w, 3)), (width, height)) for h, w in ((4, 4), (30, 30))
            ]
            noise = rng.random((height, width, 3))
            image = 255 * (0.55 * layers[0] + 0.3 * layers[1] + 0.15 * noise)
            large = bool(needs_windows(np.array([[0, 0, width, height]]), shown)[0])
            writer.add(image.astype(np.uint8), 0, image_id=n, windows=windows and large)
        writer.finish()
    return SampleStore(path)


def blow_up(path: Path, samples: int) -> None:
    """Repeat the index of the store at ``path`` until it holds ``samples`` records."""
    header, index = read_header(path), np.load(path / INDEX_NAME)
    index = np.resize(index, samples)
    index["image_id"] = np.arange(samples)
    np.save(path / INDEX_NAME, index)
    header["samples"], header["fingerprint"] = samples, fingerprint(header["categories"], index)
    (path / "header.json").write_text(json.dumps(header))


def private_memory() -> float:
    """MB that this process shares with none."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    values = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
    return (values["Private_Clean"] + values["Private_Dirty"]) / 1000


def store_pss(folder: Path) -> float:
    """MB of the store's files that this process maps, each page divided by those who map it."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(" ", 1)[0]
        if not first.endswith(":"):
            inside = str(folder) in line
        elif inside and first == "Pss:":
            total += int(line.split()[1])
    return total / 1000


def read_randomly(store: SampleStore, reads: int, seed: int) -> float:
    """Seconds for ``reads`` random whole samples."""
    numbers = np.random.default_rng(seed).integers(0, len(store), reads).tolist()
    started = time.perf_counter()
    for i in numbers:
        store[i]
    return time.perf_counter() - started


def worker(store: SampleStore, number: int, barrier: object, results: object) -> None:
    """Read all over the store; tell what memory that took, while all others hold theirs."""
    before = private_memory()
    read_randomly(store, 50_000, number)
    store.classes.sum(), store.groups.sum(), store.sizes.sum()
    barrier.wait()
    results.put((private_memory() - before, store_pss(store.paths[0])))
    barrier.wait()


def measure_workers(store: SampleStore, count: int) -> tuple[float, float]:
    """(most private MB that a worker gained, PSS of the store in this process and all workers)."""
    context = get_context("fork")
    barrier, results = context.Barrier(count + 1), context.Queue()
    tasks = [(store, number, barrier, results) for number in range(count)]
    processes = [context.Process(target=worker, args=task) for task in tasks]
    for process in processes:
        process.start()
    barrier.wait()
    gained = [results.get() for _ in processes]
    pss = store_pss(store.paths[0]) + sum(g[1] for g in gained)
    barrier.wait()
    for process in processes:
        process.join()
    return max((g[0] for g in gained), default=0.0), pss


def measure_overhead(store: SampleStore) -> dict[str, float]:
    """Shares of the JPEG bytes: index, tar, and both."""
    encoded = int(store.index["length"].sum())
    tar = sum(shard["bytes"] for shard in store.header["shards"]) - encoded
    index = os.path.getsize(store.paths[0] / INDEX_NAME)
    return {"mean": encoded / len(store), "tar": tar / encoded, "index": index / encoded}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        store, plain = draw_store(folder / "with"), draw_store(folder / "without", windows=False)
        overhead = measure_overhead(store)
        restarts = store.index["length"].sum() / plain.index["length"].sum() - 1
        draw_store(folder / "large", count=300)
        blow_up(folder / "large", args.samples)
        command = [sys.executable, "-c", OPEN_SCRIPT, str(folder / "large")]
        opened = [float(subprocess.check_output(command)) for _ in range(args.repeats)]
        large = SampleStore(folder / "large")
        rates = [100_000 / read_randomly(large, 100_000, n) for n in range(args.repeats)]
        checked = time.perf_counter()
        for i in range(20_000):
            large.view(i, check=True)
        checked = 20_000 / (time.perf_counter() - checked)
        large.classes.sum(), large.groups.sum(), large.sizes.sum()
        alone, eight = measure_workers(large, 0), measure_workers(large, 8)
    print(f"{args.samples} samples, medians of {args.repeats}")
    print(f"open and read one, fresh process  {statistics.median(opened):8.4f} s  (goal: 0.1)")
    print(f"random reads, page cache          {statistics.median(rates):8.0f} /s (goal: 100000)")
    print(f"the same with CRC-32              {checked:8.0f} /s")
    print(f"private memory of a worker        {eight[0]:8.1f} MB (goal: 20)")
    print(f"PSS of the store, no worker       {alone[1]:8.1f} MB")
    print(f"PSS of the store, 8 workers       {eight[1]:8.1f} MB (all processes together)")
    print(f"mean JPEG                         {overhead['mean']:8.0f} B")
    total = overhead["tar"] + overhead["index"] + restarts
    print(f"overhead of tar                   {overhead['tar']:8.2%}")
    print(f"overhead of index                 {overhead['index']:8.2%}")
    print(f"overhead of restart intervals     {restarts:8.2%}")
    print(f"overhead together                 {total:8.2%}  (goal: 12 %)")


if __name__ == "__main__":
    main()

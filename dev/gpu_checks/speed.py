"""How fast: images/s beside the bare backbone and the card, the loader, an ERF refresh."""

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from bench_train import build, matrix_ceiling
from detectron2.config import CfgNode
from gpu_checks.bench import AMP_DTYPES, MODES, Bench, Speed, set_tf32
from gpu_checks.report import Finding, expect, note

from jigsaw_d2.cost import TRAIN_FORWARDS

BATCH = 512  # the paper's


def speed(bench: Bench, batch: int, mode: str) -> Iterator[Finding]:
    """images/s of R50 beside the bare backbone's, the card's matrix rate, peak memory."""
    compiled = mode == "compiled"
    if compiled:
        mode = _best(bench, BATCH, among=tuple(AMP_DTYPES)) or "fp16"
    keys = {"SOLVER.IMS_PER_BATCH": bench.pick(batch, 2), "MODEL.JIGSAW.COMPILE": compiled}
    cfg = bench.cfg(mode, {**keys, "CUDNN_BENCHMARK": True})
    with bench.compiler():
        rows = {row: build(row, cfg, str(bench.new_folder())) for row in "ab"}
        rates, peaks = _race(bench, {row: steps for row, (steps, _) in rows.items()}, cfg)
    macs = rows["a"][1]._macs
    del rows
    bench.free()
    images = statistics.median(rates["b"])
    ratio = statistics.median(b / a for a, b in zip(rates["a"], rates["b"]))
    name = "compiled" if compiled else mode
    bench.speeds[batch, name] = Speed(images, ratio)
    title = f"{name} ({mode})" if compiled else mode
    spread = f"{min(rates['b']):,.0f} to {max(rates['b']):,.0f}"
    step = 1000 * cfg.SOLVER.IMS_PER_BATCH / images
    yield note(f"{title}: images/s", f"{images:,.0f} ({spread}), {step:.0f} ms a step")
    bare = statistics.median(rates["a"])
    yield note(f"{title}: bare backbone", f"{bare:,.0f} images/s, b/a {ratio:.3f}")
    flops = 2 * TRAIN_FORWARDS * macs * images
    ceiling = _matrix_rate(bench, mode)
    value = f"{flops / 1e12:.1f} TFLOP/s, {flops / ceiling:.1%} of {ceiling / 1e12:.0f}"
    yield note(f"{title}: of the matrix rate", value)
    if not bench.dry:
        share = peaks["b"] / torch.cuda.get_device_properties(0).total_memory
        value = (
            f"{peaks['b'] / 2**30:.1f} GiB, {peaks['b'] / peaks['a']:.3f} of the bare backbone's"
        )
        yield expect(f"{title}: peak memory", value, "< 0.95 of the card's", share < 0.95)


def best_mode(bench: Bench) -> Iterator[Finding]:
    """The goals of the best mode at batch 512, of one H100."""
    name = _best(bench, BATCH)
    if name is None:
        yield expect("best mode", "no speed was measured", "one", False)
        return
    best = bench.speeds[BATCH, name]
    value, expected = f"{best.images:,.0f} images/s ({name})", ">= 3,500 images/s on an H100"
    card = "" if bench.dry else torch.cuda.get_device_name()
    if bench.dry or "H100" in card or "H200" in card:
        yield bench.goal("best mode", value, expected, best.images >= 3500)
    else:
        yield note("best mode", value)
    yield bench.goal(f"b/a of {name}", f"{best.ratio:.3f}", ">= 0.97", best.ratio >= 0.97)


def real_loader(bench: Bench) -> Iterator[Finding]:
    """Training on the real loader against the same on one batch that is there already."""
    mode = _best(bench, BATCH, among=tuple(MODES)) or "fp16"
    workers, batch = bench.pick(bench.loader_workers, 0), bench.pick(BATCH, 2)
    keys = {"SOLVER.IMS_PER_BATCH": batch, "CUDNN_BENCHMARK": True}
    n = bench.pick(40, 2)
    with bench.trainer(mode, keys) as (_, steps):
        steps(n // 4 + 1)
        synthetic = _seconds(steps, n)
    keys["DATALOADER.NUM_WORKERS"] = workers
    with bench.trainer(mode, keys, real=True) as (trainer, steps):
        # Not in turns with the other: in its absence the workers would fill their queues. They are
        # emptied first, twice over, so that a loader too slow shows.
        steps(4 * workers + n // 4 + 1)
        real = _seconds(steps, n)
        waits = [value for value, _ in trainer.storage.history("data_wait_share").values()[-n:]]
    ratio, wait = synthetic / real, statistics.mean(waits)
    rates = f"{n * batch / real:,.0f} of {n * batch / synthetic:,.0f} images/s in {mode}"
    value = f"{ratio:.3f}: {rates}, {workers} workers"
    yield bench.goal("real / synthetic", value, ">= 0.97", ratio >= 0.97)
    yield bench.goal("wait for data", f"{wait:.2%} of a step", "< 2 %", wait < 0.02)


def deterministic(bench: Bench) -> Iterator[Finding]:
    """What ``train_net.py --deterministic`` costs."""
    mode, batch, n = "fp16", bench.pick(BATCH, 2), bench.pick(20, 2)
    keys, seconds = {"SOLVER.IMS_PER_BATCH": batch, "CUDNN_BENCHMARK": True}, {}
    for exact in (False, True):
        with bench.trainer(mode, {**keys, "SOLVER.DETERMINISTIC": exact}) as (_, steps):
            steps(n // 4 + 1)
            seconds[exact] = _seconds(steps, n)
    torch.use_deterministic_algorithms(False)
    rates = ", ".join(f"{n * batch / value:,.0f}" for value in seconds.values())
    value = f"{seconds[True] / seconds[False]:.2f} times the time in {mode}: {rates} images/s"
    yield note("--deterministic", value)


def erf_refresh(bench: Bench) -> Iterator[Finding]:
    """What a refresh of the label weights costs, in iterations of batch 512."""
    mode = _best(bench, BATCH, among=tuple(AMP_DTYPES)) or "bf16"
    keys = {
        "SOLVER.IMS_PER_BATCH": bench.pick(BATCH, 2),
        "MODEL.JIGSAW.ERF.NUM_IMAGES": bench.pick(64, 1),
        "MODEL.JIGSAW.ERF.FIRST_ITER": 8,
        "MODEL.JIGSAW.ERF.PERIOD": 4,
        "CUDNN_BENCHMARK": True,
    }
    with bench.trainer(mode, keys) as (trainer, steps):
        steps(3)
        step = _seconds(steps, 5) / 5  # iterations 3 to 7, before the first refresh
        steps(6)  # refreshes at 8, which warms up, and at 12
        seconds = trainer.storage.latest()["erf/seconds"][0]
    value = f"{seconds / step:.2f} iterations: {seconds:.2f} s in {mode}, a step {step:.3f} s"
    yield bench.goal("refresh", value, "<= 3", seconds <= 3 * step)


def _race(bench: Bench, rows: dict[str, Callable], cfg: CfgNode) -> tuple[dict, dict]:
    """The rows in turns, about a second each: images/s of each turn, and peak bytes of each row."""
    for steps in rows.values():
        steps(bench.pick(4, 1))
    seconds = max(_seconds(steps, 1) for steps in rows.values())
    count = bench.pick(max(2, min(20, round(1.2 / seconds))), 1)
    rates: dict[str, list[float]] = {row: [] for row in rows}
    peaks = dict.fromkeys(rows, 0)
    for _ in range(bench.pick(3, 1)):
        for row, steps in rows.items():
            if not bench.dry:
                torch.cuda.reset_peak_memory_stats()
            rates[row].append(count * cfg.SOLVER.IMS_PER_BATCH / _seconds(steps, count))
            if not bench.dry:
                peaks[row] = torch.cuda.max_memory_allocated()
    return rates, peaks


def _seconds(steps: Callable[[int], None], count: int) -> float:
    """Of so many steps, to the end of the last."""
    start = time.perf_counter()
    steps(count)
    return time.perf_counter() - start


def _best(bench: Bench, batch: int, among: tuple[str, ...] = (*MODES, "compiled")) -> str | None:
    """The fastest mode of those measured so far."""
    found = {m: s.images for (size, m), s in bench.speeds.items() if size == batch and m in among}
    return max(found, key=found.get, default=None)


def _matrix_rate(bench: Bench, mode: str) -> float:
    """FLOP/s of large matrix products in the precision of a mode."""
    set_tf32(MODES[mode]["SOLVER.TF32"])
    dtype = AMP_DTYPES.get(mode, torch.float32)
    return matrix_ceiling(torch.device(bench.device), dtype, bench.pick(16384, 256))

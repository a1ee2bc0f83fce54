#!/usr/bin/env python
"""Whether everything works on a GPU, as on the CPU, and how fast: one call of under eight minutes.

    make setup && .venv/bin/python dev/gpu_check.py --output results   # on a machine with a GPU
    .venv/bin/python dev/gpu_check.py --dry                            # on any: does it all run?

Every finding is a line: PASS or FAIL, the value, what was expected. gpu_check.json and gpu_check.md
in the output folder hold them all, written anew after each check. A check that fails ends nothing;
the most important ones come first, and none is started after the time limit. The goals for speed
are those of one H100; another card's are written down as notes.

The dry form works on the CPU, with tiny sizes: speeds and numbers mean nothing there, and what only
a GPU has says "not on a CPU". Without network: install the packages that dev/constraints.txt names
from wheels; nothing is downloaded while the checks run.
"""

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, partialmethod
from pathlib import Path
from unittest import mock

import torch
from bench_train import build, matrix_ceiling
from check_report import (
    FAIL,
    NOT_RUN,
    SKIPPED,
    Check,
    Finding,
    Result,
    expect,
    format_result,
    names_with,
    note,
    run_checks,
    summary,
    write_report,
)
from detectron2.config import CfgNode
from gpu_bench import (
    AMP_DTYPES,
    MODES,
    ROOT,
    Bench,
    batch_bytes,
    set_tf32,
    shared_memory_free,
)
from helpers_weights import FPN
from torch import nn

from jigsaw_d2 import losses
from jigsaw_d2.config import OBJECTIVES
from jigsaw_d2.cost import TRAIN_FORWARDS, backbone_macs
from jigsaw_d2.erf import measure_erf
from jigsaw_d2.erf_weights import region_weights
from jigsaw_d2.trainer import JigsawTrainer

BATCH = 512  # the paper's
WRITE_PERIOD = 20  # iterations between two lines of metrics.json
TRAIN_NET = ROOT / "projects" / "JigsawPretrain" / "train_net.py"


def goal(bench: Bench, what: str, value: str, expected: str, ok: bool) -> Finding:
    """An expectation that only a GPU can meet."""
    return Finding(what, value, expected, SKIPPED) if bench.dry else expect(what, value, expected, ok)


def environment(bench: Bench) -> Iterator[Finding]:
    """The machine, the libraries, and the shared memory that loaders need"""
    import cv2
    import numpy
    import torchvision

    if bench.dry:
        yield Finding("GPU", platform.processor() or platform.machine(), "a GPU", SKIPPED)
    else:
        card = torch.cuda.get_device_properties(0)
        size = f"{card.total_memory / 2**30:.0f} GiB, {card.multi_processor_count} SMs"
        yield note("GPU", f"{card.name}, {size}, compute {card.major}.{card.minor}")
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        cuda = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, NCCL {nccl}"
        yield note("driver", f"{_driver_version()}, {cuda}")
    libraries = (torch, torchvision, numpy, cv2)
    versions = ", ".join(f"{library.__name__} {library.__version__}" for library in libraries)
    yield note("Python", f"{platform.python_version()}, {versions}")
    yield note("CPU cores", str(os.cpu_count()))
    free, workers = shared_memory_free(), bench.loader_workers
    need = 2 * workers * batch_bytes(BATCH)  # two batches wait for each worker
    yield expect(
        "free /dev/shm",
        f"{free / 2**30:.1f} GiB",
        f">= {need / 2**30:.1f} GiB: {workers} workers, two batches of {BATCH} each",
        free >= need,
    )


def objectives(bench: Bench) -> Iterator[Finding]:
    """Each objective's loss and gradients against the CPU's, float32; AMP's loss"""
    for objective in OBJECTIVES:
        cpu, gpu, batch = bench.twins(objective)
        want, got = (model(batch)["loss_jigsaw"] for model in (cpu, gpu))
        want.backward()
        got.backward()
        error = abs(got.item() / want.item() - 1)
        yield expect(f"{objective}: loss, relative error", f"{error:.1e}", "< 1e-4", error < 1e-4)
        cosine = nn.functional.cosine_similarity(_gradients(cpu), _gradients(gpu), dim=0).item()
        what = f"{objective}: gradients, cosine"
        yield expect(what, f"{cosine:.7f}", "> 0.9999", cosine > 0.9999)
        for name, dtype in AMP_DTYPES.items():
            with torch.autocast(bench.device, dtype=dtype), torch.no_grad():
                error = abs(gpu(batch)["loss_jigsaw"].item() / want.item() - 1)
            what = f"{objective}: {name} loss, relative error"
            yield goal(bench, what, f"{error:.1e}", "< 0.02", error < 0.02)


def loss_gradient(bench: Bench) -> Iterator[Finding]:
    """The loss's own gradient against autograd's, in float64"""
    regions = bench.twins("erf_adaptive")[1].cell_regions
    options = {"dtype": torch.float64, "device": bench.device}
    logits = torch.randn(4, 9, *regions.shape, **options, requires_grad=True)
    classes = torch.tensor([[8, 8, 8, 1], [0, 1, 2, 3], [4, 4, 4, 4], [7, 0, 7, 0]])
    classes = classes.to(bench.device)
    weights = torch.rand(4, *regions.shape, **options).softmax(dim=0)
    loss = losses.erf_adaptive_loss(logits, classes, weights, regions)
    (ours,) = torch.autograd.grad(loss, logits)
    dense = -(losses.soft_labels(weights, classes, 9) * logits.log_softmax(1)).sum(1)
    (theirs,) = torch.autograd.grad(losses.region_means(dense, regions).mean(), logits)
    error = (ours - theirs).abs().max().item()
    yield expect("largest difference", f"{error:.1e}", "< 1e-12", error < 1e-12)


def erf_numbers(bench: Bench) -> Iterator[Finding]:
    """Region sums of the ERF against the CPU's, and the label weights that AMP makes of them"""
    cpu, gpu, batch = bench.twins("erf_adaptive")
    images = cpu.preprocess(batch["image"])
    want = measure_erf(cpu.backbone, images, cpu.template).region_sums
    weights = region_weights(want, cpu.cell_regions)
    for name, dtype in {"fp32": None, **AMP_DTYPES}.items():
        measured = measure_erf(gpu.backbone, images, gpu.template, with_maps=True, amp_dtype=dtype)
        sums = measured.region_sums.cpu()
        if dtype is None:
            error = ((sums - want).abs() / want.clamp_min(1e-3 * want.max())).max().item()
            yield expect("sums in fp32, relative", f"{error:.1e}", "< 1e-3", error < 1e-3)
        else:
            shift = (region_weights(sums, cpu.cell_regions) - weights).abs().max().item()
            what = f"label weights in {name}, largest change"
            yield goal(bench, what, f"{shift:.1e}", "< 0.01", shift < 0.01)


def hidden_waits(bench: Bench) -> Iterator[Finding]:
    """Waits of the host for the GPU in a step, beside the event that it means to wait for"""
    for mode in ("fp32", *AMP_DTYPES):
        size = {"SOLVER.IMS_PER_BATCH": bench.pick(32, 2)}
        with bench.trainer(mode, size) as (trainer, steps):
            steps(3)
            plain = _waits(bench, trainer, 8)
            trainer.iter = WRITE_PERIOD - 1
            logged = _waits(bench, trainer, 1)
        value = f"{len(plain) / 8:.2f} a step {_places(plain)}".strip()
        yield goal(bench, mode, value, "0", not plain)
        value = f"{len(logged)} {_places(logged)}".strip()
        yield goal(bench, f"{mode}, the step that logs", value, "<= 1", len(logged) <= 1)


def kill_and_resume(bench: Bench) -> Iterator[Finding]:
    """train_net.py whole: ERF figures, evaluation, checkpoints; killed and resumed, both ways"""
    length, period = bench.pick(60, 24), bench.pick(20, 8)
    keys = {
        "SOLVER.IMS_PER_BATCH": bench.pick(64, 2),
        "SOLVER.MAX_ITER": length,
        "SOLVER.CHECKPOINT_PERIOD": period,
        "TEST.EVAL_PERIOD": period,
        "MODEL.JIGSAW.ERF.FIRST_ITER": 0,
        "MODEL.JIGSAW.ERF.PERIOD": period,
        "MODEL.JIGSAW.ERF.NUM_IMAGES": bench.pick(64, 1),
        "DATALOADER.NUM_WORKERS": bench.pick(2, 0),
    }
    ways = {"default": (), "deterministic": ("--deterministic",)}
    started = {}
    for way, flags in ways.items():
        for end in ("whole", "killed"):
            folder = bench.folder / f"{way}_{end}"
            options = bench.options(bench.pick("fp16", "bf16"), {**keys, "OUTPUT_DIR": folder})
            argv = ("pretrain", "--config-file", "jigsaw_R_50.yaml", *flags)
            started[way, end] = (bench.start(*argv, *options), argv, options, folder)
    for way in ways:
        command, argv, options, folder = started[way, "killed"]
        alive = command.wait_for(folder / "last_checkpoint")
        status = command.kill()
        what = f"{way}: killed after a checkpoint"
        said = "" if alive else f" {command.said()}"
        yield expect(what, f"exit {status}{said}", "exit -9", status == -9)
        started[way, "killed"] = (bench.start(*argv, "--resume", *options), *started[way, "killed"][1:])
    for way in ways:
        yield from _compare_runs(bench, way, started[way, "whole"], started[way, "killed"])


def _compare_runs(bench: Bench, way: str, whole: tuple, resumed: tuple) -> Iterator[Finding]:
    """The unbroken run and the resumed one: exit status, losses, last weights."""
    statuses = [run[0].wait() for run in (whole, resumed)]
    bad = [run[0].said() for run, status in zip((whole, resumed), statuses) if status]
    value = f"exit {statuses[0]} and {statuses[1]} {' '.join(bad)}".strip()
    yield expect(f"{way}: unbroken and resumed", value, "exit 0 and 0", not bad)
    if bad:
        return
    curves = [_losses(run[3]) for run in (whole, resumed)]
    first, last = min(curves[0]), max(curves[0])
    value = f"{curves[0][first]:.4f} at {first}, {curves[0][last]:.4f} at {last}"
    yield goal(bench, f"{way}: loss", value, "falls", curves[0][last] < curves[0][first])
    worst = max(abs(curves[1][k] / curves[0][k] - 1) for k in curves[0])
    equal = _same_weights(whole[3], resumed[3])
    bits = "weights equal bit for bit" if equal else "weights not equal bit for bit"
    value = f"losses within {worst:.2e}, last {bits}"
    if way == "default":
        yield expect("default: resumed against unbroken", value, "losses within 0.05", worst < 0.05)
    else:
        yield expect(f"{way}: resumed against unbroken", value, "bit for bit", equal and not worst)


@dataclass(frozen=True)
class Speed:
    """Medians of what one mode reached."""

    images: float
    ratio: float


def speed(bench: Bench, batch: int, mode: str) -> Iterator[Finding]:
    """images/s of R50 beside the bare backbone's, the card's matrix rate, peak memory"""
    compiled = mode == "compiled"
    if compiled:
        mode = _best(bench, BATCH, among=tuple(AMP_DTYPES)) or "fp16"
    keys = {"SOLVER.IMS_PER_BATCH": bench.pick(batch, 2), "MODEL.JIGSAW.COMPILE": compiled}
    cfg = bench.cfg(mode, {**keys, "CUDNN_BENCHMARK": True})
    with _quick_compiler(bench):
        rows = {row: build(row, cfg, str(bench.new_folder())) for row in "ab"}
        rates, peaks = _race(bench, {row: steps for row, (steps, _) in rows.items()}, cfg)
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
    flops = 2 * TRAIN_FORWARDS * backbone_macs(cfg, *cfg.INPUT.JIGSAW.TEMPLATE_SIZE) * images
    ceiling = _matrix_rate(bench, mode)
    value = f"{flops / 1e12:.1f} TFLOP/s, {flops / ceiling:.1%} of {ceiling / 1e12:.0f}"
    yield note(f"{title}: of the matrix rate", value)
    if not bench.dry:
        share = peaks["b"] / torch.cuda.get_device_properties(0).total_memory
        value = f"{peaks['b'] / 2**30:.1f} GiB, {peaks['b'] / peaks['a']:.3f} of the bare backbone's"
        yield expect(f"{title}: peak memory", value, "< 0.95 of the card's", share < 0.95)


def best_mode(bench: Bench) -> Iterator[Finding]:
    """The goals of the best mode at batch 512, of one H100"""
    name = _best(bench, BATCH)
    if name is None:
        yield expect("best mode", "no speed was measured", "one", False)
        return
    best = bench.speeds[BATCH, name]
    value, expected = f"{best.images:,.0f} images/s ({name})", ">= 3,500 images/s on an H100"
    if bench.dry or "H100" in torch.cuda.get_device_name() or "H200" in torch.cuda.get_device_name():
        yield goal(bench, "best mode", value, expected, best.images >= 3500)
    else:
        yield note("best mode", value)
    yield goal(bench, f"b/a of {name}", f"{best.ratio:.3f}", ">= 0.97", best.ratio >= 0.97)


def real_loader(bench: Bench) -> Iterator[Finding]:
    """Training on the real loader against the same on one batch that is there already"""
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
    yield goal(bench, "real / synthetic", value, ">= 0.97", ratio >= 0.97)
    yield goal(bench, "wait for data", f"{wait:.2%} of a step", "< 2 %", wait < 0.02)


def erf_refresh(bench: Bench) -> Iterator[Finding]:
    """What a refresh of the label weights costs, in iterations of batch 512"""
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
    yield goal(bench, "refresh", value, "<= 3", seconds <= 3 * step)


def torchrun(bench: Bench) -> Iterator[Finding]:
    """torchrun with one process (NCCL on a GPU): train_net.py as shipped, 2 iterations"""
    keys = {
        "SOLVER.IMS_PER_BATCH": bench.pick(64, 2),
        **bench.resnet,
        "SOLVER.MAX_ITER": 2,
        "MODEL.JIGSAW.ERF.FIRST_ITER": bench.pick(0, 10**6),
        "OUTPUT_DIR": bench.folder / "torchrun",
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    argv = [TRAIN_NET, "--config-file", "jigsaw_R_50.yaml", *bench.options("", keys)]
    done = subprocess.run([*launcher, *argv], capture_output=True, text=True, cwd=bench.folder)
    said = f" {done.stderr.strip()[-300:]}" if done.returncode else ""
    yield expect("exit status", f"{done.returncode}{said}", "0", done.returncode == 0)
    there = (bench.folder / "torchrun" / "model_final.pth").is_file()
    yield expect("model_final.pth", "written" if there else "missing", "written", there)
    if there:
        for line in (bench.folder / "torchrun" / "log.txt").read_text().splitlines():
            if "computing in" in line or "in a trial" in line:
                yield note("log", line.split("INFO: ")[-1])


def commands(bench: Bench) -> Iterator[Finding]:
    """convert and finetune (R50-FPN, AMP, evaluation); erf and visualize erf meanwhile"""
    run, weights = bench.folder / "to_convert", bench.folder / "weights.pkl"
    small = {**bench.resnet, "SOLVER.IMS_PER_BATCH": bench.pick(16, 2), "OUTPUT_DIR": run}
    with bench.trainer("bf16", small) as (trainer, steps):
        steps(1)
        with trainer.storage:
            trainer.iter -= 1
            trainer.save_checkpoint("model_final")
    network = ("--device", bench.device, "--config-file", "jigsaw_R_50.yaml")
    opts = ("--opts", *bench.options("", bench.resnet))
    size = ("--size", *[bench.pick(224, 64)] * 2, "--num-images", bench.pick(4, 1))
    erf = ("--feature", "res5", *size, "--output", bench.folder / "erf")
    drawn = ("--store", bench.store, "--num-images", bench.pick(16, 1))
    started = [
        bench.start("erf", *network, *erf, *opts),
        bench.start("visualize", "erf", *network, *drawn, "--output", bench.folder / "v.png", *opts),
        bench.start("convert", "--input", run, "--output", weights),
    ]
    if started[-1].wait() == 0:
        files = [
            [name, f"{bench.coco}/{name}.json", f"{bench.coco}/images"] for name in ("train", "val")
        ]
        options = {
            "MODEL.DEVICE": bench.device,
            "DATASETS.COCO_FILES": files,
            "DATASETS.TRAIN": ("train",),
            "DATASETS.TEST": ("val",),
            "OUTPUT_DIR": bench.folder / "detector",
            "SOLVER.MAX_ITER": bench.pick(10, 1),
            "SOLVER.AMP.ENABLED": not bench.dry,  # Detectron2's AMP is for GPUs alone
        }
        flat = [item for pair in options.items() for item in pair]
        argv = ("finetune", "--config-file", FPN, "--weights", weights)
        batch = ["SOLVER.IMS_PER_BATCH", bench.pick(4, 1)]
        started.append(bench.start(*argv, *bench.detector_options, *flat, *batch))
    for command in started:
        status = command.wait()
        said = f" {command.said()}" if status else ""
        yield expect(command.name, f"exit {status}{said}", "exit 0", status == 0)
    names = ("erf/erf.png", "v.png", "weights.pkl", "detector/results.json")
    missing = [name for name in names if not (bench.folder / name).is_file()]
    value = ", ".join(missing) if missing else "written"
    yield expect("files", f"{value}", "all written", not missing)


def compiled(bench: Bench) -> Iterator[Finding]:
    """MODEL.JIGSAW.COMPILE with the default objective, ERF refreshes and evaluations"""
    period = 4
    keys = {
        "SOLVER.IMS_PER_BATCH": bench.pick(64, 2),
        "MODEL.JIGSAW.COMPILE": True,
        "MODEL.JIGSAW.ERF.FIRST_ITER": 0,
        "MODEL.JIGSAW.ERF.PERIOD": period,
        "MODEL.JIGSAW.ERF.NUM_IMAGES": bench.pick(16, 1),
        "TEST.EVAL_PERIOD": period,
    }
    torch.compiler.reset()
    with _quick_compiler(bench), bench.trainer("bf16", keys) as (trainer, steps):
        start = time.perf_counter()
        steps(period + 1)  # past the first evaluation, and the refresh after it
        seconds, graphs = time.perf_counter() - start, _compiled_graphs()
        steps(2 * period)
        later = _compiled_graphs()
        loss = trainer.storage.latest()["total_loss"][0]
    torch.compiler.reset()
    yield note("to compile", f"{seconds:.0f} s, {graphs} graphs")
    value = f"{later - graphs} in {2 * period} iterations"
    yield expect("recompilations after the first evaluation", value, "0", later == graphs > 0)
    yield expect("loss", f"{loss:.4f}", "finite", math.isfinite(loss))


def variants(bench: Bench) -> Iterator[Finding]:
    """Group norm, deformable convolution, accumulation, the device by its number: 3 steps each"""
    cases = {
        "GN": ({}, "jigsaw_R_50_GN.yaml"),
        "DCN": ({}, "jigsaw_R_50_DCN.yaml"),
        "accumulation over 2": ({"SOLVER.ACCUMULATION_STEPS": 2}, "jigsaw_R_50.yaml"),
    }
    if not bench.dry:
        cases["cuda:0"] = ({"MODEL.DEVICE": "cuda:0"}, "jigsaw_R_50.yaml")
    for name, (keys, config) in cases.items():
        keys = {**bench.resnet, **keys, "SOLVER.IMS_PER_BATCH": bench.pick(16, 4)}
        with bench.trainer(bench.pick("fp16", "bf16"), keys, config) as (trainer, steps):
            steps(3)
            loss = trainer.storage.latest()["total_loss"][0]
        yield expect(f"{name}: loss", f"{loss:.4f}", "finite", math.isfinite(loss))


def cuda_tests(bench: Bench) -> Iterator[Finding]:
    """The tests marked cuda, which are skipped without a GPU"""
    if bench.dry:
        yield Finding("pytest -m cuda", "", "all pass", SKIPPED)
        return
    argv = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "tests"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    last = done.stdout.strip().splitlines()[-1:] or [done.stderr.strip()[-300:]]
    print(done.stdout[-3000:], flush=True)
    yield expect("pytest -m cuda", last[0], "all pass", done.returncode == 0)


CHECKS: dict[str, Check] = {
    "environment": environment,
    "objectives": objectives,
    "loss_gradient": loss_gradient,
    "erf_numbers": erf_numbers,
    "hidden_waits": hidden_waits,
    "kill_and_resume": kill_and_resume,
    **{f"speed_512_{m}": partial(speed, batch=BATCH, mode=m) for m in ("fp16", "bf16", "TF32")},
    "speed_512_compiled": partial(speed, batch=BATCH, mode="compiled"),
    "best_mode": best_mode,
    "real_loader": real_loader,
    "erf_refresh": erf_refresh,
    "torchrun": torchrun,
    "commands": commands,
    "cuda_tests": cuda_tests,
    "variants": variants,
    "compiled": compiled,
    "speed_512_fp32": partial(speed, batch=BATCH, mode="fp32"),
    **{f"speed_256_{m}": partial(speed, batch=256, mode=m) for m in (*reversed(MODES), "compiled")},
}


def _driver_version() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    argv = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(argv, capture_output=True, text=True).stdout.strip() or "unknown"


def _gradients(model: nn.Module) -> torch.Tensor:
    """All of them, one after the other: float64 on the CPU."""
    return torch.cat([p.grad.flatten().cpu().double() for p in model.parameters()])


def _waits(bench: Bench, trainer: JigsawTrainer, steps: int) -> list[warnings.WarningMessage]:
    """torch's warnings of synchronizing calls in so many iterations; none on a CPU."""
    with warnings.catch_warnings(record=True) as caught, trainer.storage:
        warnings.simplefilter("always")
        if not bench.dry:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(steps):
                trainer.before_step()
                trainer.run_step()
                trainer.after_step()
                trainer.iter += 1
        finally:
            if not bench.dry:
                torch.cuda.set_sync_debug_mode("default")
    return [warning for warning in caught if "synchroniz" in str(warning.message)]


def _places(caught: list[warnings.WarningMessage]) -> str:
    places = {f"{Path(w.filename).name}:{w.lineno}" for w in caught}
    return ", ".join(sorted(places))


def _losses(folder: Path) -> dict[int, float]:
    """{iteration: smoothed total loss} of a run's metrics.json."""
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return {line["iteration"]: line["total_loss"] for line in lines if "total_loss" in line}


def _same_weights(*folders: Path) -> bool:
    """Whether the last checkpoints hold the same model, bit for bit."""
    one, two = (
        torch.load(folder / "model_final.pth", map_location="cpu", weights_only=True)["model"]
        for folder in folders
    )
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


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


@contextmanager
def _quick_compiler(bench: Bench) -> Iterator[None]:
    """Dry, only capture and differentiate: generating code takes minutes on a CPU."""
    if not bench.dry:
        yield
        return
    quick = partialmethod(nn.Module.compile, backend="aot_eager")
    with mock.patch.object(nn.Module, "compile", quick):
        yield


def _compiled_graphs() -> int:
    """That torch.compile has made so far in this process, recompilations included."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(os.environ.get("OUT", ".")),
        help="folder of gpu_check.json and gpu_check.md (default: $OUT, or the current folder)",
    )
    parser.add_argument("--only", nargs="+", choices=CHECKS, metavar="CHECK", help="these alone")
    parser.add_argument(
        "--time-limit",
        type=float,
        default=450,
        metavar="SECONDS",
        help="start no check after this (default %(default)s)",
    )
    parser.add_argument("--dry", action="store_true", help="on the CPU, at tiny sizes")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the checks; 0 = nothing failed and nothing was left out."""
    args = build_parser().parse_args(argv)
    if not args.dry and not torch.cuda.is_available():
        print("gpu_check: PyTorch sees no GPU; --dry runs the checks on the CPU", file=sys.stderr)
        return 2
    start = time.perf_counter()
    args.output.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.dry)
    checks = {name: CHECKS[name] for name in CHECKS if not args.only or name in args.only}

    def report(results: list[Result]) -> None:
        seconds = time.perf_counter() - start
        write_report(args.output, results, dry=args.dry, seconds=round(seconds, 1))
        print(format_result(results[-1]), flush=True)

    try:
        results = run_checks(checks, bench, args.time_limit, report)
    finally:
        bench.close()
    print(summary(results))
    return int(bool(names_with(results, FAIL) or names_with(results, NOT_RUN)))


if __name__ == "__main__":
    sys.exit(main())

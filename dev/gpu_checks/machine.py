"""The machine itself, and the tests that need it."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator

import cv2
import numpy
import torch
import torchvision
from gpu_checks import ROOT
from gpu_checks.bench import Bench, shared_memory_free, wanted_workers, worker_bytes
from gpu_checks.report import SKIPPED, Finding, expect, note


def environment(bench: Bench) -> Iterator[Finding]:
    """The machine, the libraries, and the shared memory that loaders need."""
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
    free, need = shared_memory_free(), wanted_workers() * worker_bytes()
    expected = f">= {need / 2**30:.1f} GiB, for {wanted_workers()} workers at batch 512"
    yield expect("free /dev/shm", f"{free / 2**30:.1f} GiB", expected, free >= need)


def cuda_tests(bench: Bench) -> Iterator[Finding]:
    """The tests marked cuda, which are skipped without a GPU."""
    if bench.dry:
        yield Finding("pytest -m cuda", "", "all pass", SKIPPED)
        return
    argv = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "tests"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    last = done.stdout.strip().splitlines()[-1:] or [done.stderr.strip()[-300:]]
    print(done.stdout[-3000:], flush=True)
    yield expect("pytest -m cuda", last[0], "all pass", done.returncode == 0)


def _driver_version() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    argv = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(argv, capture_output=True, text=True).stdout.strip() or "unknown"

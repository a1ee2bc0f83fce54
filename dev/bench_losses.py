"""Time and memory of the ERF-adaptive loss against its dense form, which writes the labels out.

    python dev/bench_losses.py [--classes 1204] [--images 64] [--cells 7] [--repeats 15]

Both forms get the same logits and are interleaved in one process; times are medians of forward
and backward together. Peak memory is what a fresh process adds to its own while it computes one.
"""

import argparse
import multiprocessing
import os
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from jigsaw_d2.data.template import JigsawTemplate
from jigsaw_d2.modeling.erf import region_weights
from jigsaw_d2.modeling.losses import erf_adaptive_loss, region_means, soft_labels


def dense_loss(logits: Tensor, gt_classes: Tensor, weights: Tensor, regions: Tensor) -> Tensor:
    """Soft labels (N, K, h, w), then cross-entropy."""
    logits = logits.float()
    labels = soft_labels(weights, gt_classes, logits.shape[1])
    cells = -(labels * F.log_softmax(logits, dim=1)).sum(dim=1)
    return region_means(cells, regions).mean()


FORMS = {"gathered (ours)": erf_adaptive_loss, "dense labels": dense_loss}


def make_case(args: argparse.Namespace, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Logits (N, K, h, w), classes, weights and regions; random, from a fixed seed."""
    rng = torch.Generator().manual_seed(0)
    side = args.cells * 32
    regions = JigsawTemplate(side, side, 64, 64).cell_regions(32)
    logits = torch.randn(args.images, args.classes, *regions.shape, generator=rng).to(dtype)
    gt_classes = torch.randint(0, args.classes, (args.images, 4), generator=rng)
    weights = region_weights(torch.rand(*regions.shape, 4, generator=rng), regions).float()
    return logits, gt_classes, weights, regions


def step(form, logits: Tensor, *rest: Tensor) -> float:
    """CPU seconds of one forward and backward pass: other work on the machine leaves them be."""
    logits = logits.detach().requires_grad_()
    start = time.process_time()
    form(logits, *rest).backward()
    return time.process_time() - start


def peak_of(name: str, args: argparse.Namespace, dtype: torch.dtype, answer) -> None:
    """Put the MiB that one step adds to this process's peak into ``answer``."""
    torch.set_num_threads(1)
    case = make_case(args, dtype)
    step(FORMS[name], case[0][:1, :8].clone(), case[1][:1] % 8, *case[2:])  # loads what is lazy
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status_kib("VmRSS")
    step(FORMS[name], *case)
    answer.put((status_kib("VmHWM") - before) / 1024)


def status_kib(field: str) -> int:
    """A memory figure of this process, as Linux keeps it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


def measure_peak(name: str, args: argparse.Namespace, dtype: torch.dtype) -> float:
    """MiB, in a process of its own that gives freed tensors back to the system at once."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=peak_of, args=(name, args, dtype, answer))
    process.start()
    peak = answer.get()
    process.join()
    return peak


def main() -> None:
    """Print one line a form and precision."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=1204, help="K (default: LVIS, 1,204)")
    parser.add_argument("--images", type=int, default=64, help="N")
    parser.add_argument("--cells", type=int, default=7, help="h = w")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"N = {args.images}, K = {args.classes}, {args.cells}x{args.cells} cells, one core")
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case(args, dtype)
        seconds = {name: [] for name in FORMS}
        for _ in range(args.repeats + 1):
            for name, form in FORMS.items():
                seconds[name].append(step(form, *case))
        for name, form in FORMS.items():
            median = statistics.median(seconds[name][1:])  # the first warms up
            peak = measure_peak(name, args, dtype)
            print(f"{str(dtype)[6:]:9} {name:16} {1e3 * median:8.1f} ms  {peak:7.1f} MiB")


if __name__ == "__main__":
    main()

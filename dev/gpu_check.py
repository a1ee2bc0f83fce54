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
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
from gpu_checks import machine, numbers, runs, speed, steps
from gpu_checks.bench import MODES, Bench
from gpu_checks.report import (
    FAIL,
    NOT_RUN,
    Check,
    Result,
    format_result,
    names_with,
    run_checks,
    summary,
    write_report,
)

CHECKS: dict[str, Check] = {
    "environment": machine.environment,
    "objectives": numbers.objectives,
    "loss_gradient": numbers.loss_gradient,
    "erf_numbers": numbers.erf_numbers,
    "hidden_waits": steps.hidden_waits,
    "kill_and_resume": runs.kill_and_resume,
    **{f"speed_512_{m}": partial(speed.speed, batch=512, mode=m) for m in ("fp16", "bf16", "TF32")},
    "speed_512_compiled": partial(speed.speed, batch=512, mode="compiled"),
    "best_mode": speed.best_mode,
    "real_loader": speed.real_loader,
    "erf_refresh": speed.erf_refresh,
    "torchrun": runs.torchrun,
    "commands": runs.commands,
    "cuda_tests": machine.cuda_tests,
    "variants": steps.variants,
    "compiled": steps.compiled,
    "deterministic": speed.deterministic,
    "speed_512_fp32": partial(speed.speed, batch=512, mode="fp32"),
    **{
        f"speed_256_{m}": partial(speed.speed, batch=256, mode=m)
        for m in (*reversed(MODES), "compiled")
    },
}


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
        bench.tidy()

    try:
        results = run_checks(checks, bench, args.time_limit, report)
    finally:
        bench.close()
    print(summary(results))
    return int(bool(names_with(results, FAIL) or names_with(results, NOT_RUN)))


if __name__ == "__main__":
    sys.exit(main())

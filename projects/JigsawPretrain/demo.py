#!/usr/bin/env python
"""The whole job within minutes of a CPU, on a set drawn from a seed or on a folder of one's own."""

import argparse
import sys
from pathlib import Path

from benchmark.plan import PRESETS
from jigsaw_d2.tools import run_command
from jigsaw_d2.tools.run import add_training_arguments, finish


def build_parser() -> argparse.ArgumentParser:
    """Arguments of the command."""
    parser = argparse.ArgumentParser(prog="demo.py", description=__doc__)
    text = "folder with images/, train.json and val.json (COCO) instead of the set drawn"
    parser.add_argument("--data", help=text)
    parser.add_argument("--output", default="output/demo", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of every stage but the set's drawing")
    add_training_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Draw the set, run the job with and without pre-training, print the table."""
    args = build_parser().parse_args(argv)
    from benchmark.demo_data import make_demo_set
    from jigsaw_d2.tools.job import Job, default_configs
    from jigsaw_d2.tools.pipeline import DetectionSet, Pipeline, length_overrides

    output = Path(args.output).resolve()
    data = DetectionSet.from_folder(args.data) if args.data else make_demo_set(output / "data")
    # The CPU's configs on every machine: the demo is a first look, and the same one everywhere.
    configs = default_configs(on_gpu=False)
    pipeline = Pipeline(data, *configs, 1, tuple(args.register), args.trust, args.seed)
    plan = PRESETS["smoke"]  # one seed of it
    pretrain = length_overrides(pipeline.pretrain_cfg(plan.pretrain), plan.pretrain_iterations)
    detector = length_overrides(pipeline.detector_cfg(plan.detector), plan.detection_iterations)
    overrides = (
        (*plan.pretrain, *pretrain, *args.pretrain),
        (*plan.detector, *detector, *args.detector),
    )
    finish(Job(pipeline, output, *overrides, with_scratch=True, equal_cost=True))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))

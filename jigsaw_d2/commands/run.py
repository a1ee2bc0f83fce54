"""``python -m jigsaw_d2 run``: the whole job on one's own data, from annotations to a detector."""

import argparse
from pathlib import Path

import torch

from jigsaw_d2.commands.dataset_arguments import add_file_arguments, files_dataset, say
from jigsaw_d2.jobs.job import Job, JobRunner, default_configs
from jigsaw_d2.jobs.job_figures import draw_figures
from jigsaw_d2.jobs.job_report import job_report, result_tables

EPILOG = """\
examples:
  python -m jigsaw_d2 run --json train.json --images DIR --val-json val.json --output OUT
  python -m jigsaw_d2 run --json train.json --images DIR --val-json val.json --output OUT --hours 2
  python -m jigsaw_d2 run ... --pretrain SOLVER.IMS_PER_BATCH 32 --detector SOLVER.MAX_ITER 5000

Call it again after an interruption: what is done is kept, a training goes on from its checkpoint.
"""


def build_parser() -> argparse.ArgumentParser:
    """Arguments of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m jigsaw_d2 run",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_file_arguments(parser, required=True)
    parser.add_argument("--output", required=True, help="folder of everything that is made")
    parser.add_argument(
        "--hours", type=float, help="of wall-clock time: measures a few steps and sets both lengths"
    )
    on_gpu = torch.cuda.is_available()
    pretrain, detector = default_configs(on_gpu)
    parser.add_argument(
        "--config-file", default=pretrain, help="of the pre-training; on this machine: %(default)s"
    )
    parser.add_argument(
        "--detector-config", default=detector, help="of the detector; on this machine: %(default)s"
    )
    parser.add_argument(
        "--with-scratch", action="store_true", help="the detector from scratch as well"
    )
    parser.add_argument("--seed", type=int, default=0, help="of every stage")
    parser.add_argument(
        "--num-gpus",
        type=int,
        default=max(1, torch.cuda.device_count()),
        help="default: %(default)s",
    )
    parser.add_argument("--pretrain", nargs="+", default=[], metavar="X", help="KEY VALUE pairs")
    parser.add_argument("--detector", nargs="+", default=[], metavar="X", help="KEY VALUE pairs")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run what is not done yet; print the tables, name the results."""
    args = build_parser().parse_args(argv)
    job = Job(
        files_dataset(args),
        Path(args.output).resolve(),
        args.config_file,
        args.detector_config,
        tuple(args.pretrain),
        tuple(args.detector),
        seed=args.seed,
        num_gpus=args.num_gpus,
        with_scratch=args.with_scratch,
    )
    finish(job, None if args.hours is None else args.hours * 3600)
    return 0


def finish(job: Job, seconds: float | None = None) -> None:
    """Run a job, draw its figures, write its report, print its tables."""
    job.output.mkdir(parents=True, exist_ok=True)
    runner = JobRunner(job, say)
    result = runner.run(seconds)
    figures = draw_figures(runner.job, say)
    report = job.output / "report.md"
    names = [str(path.relative_to(job.output)) for path in figures]
    report.write_text(job_report(runner.job, result, names))
    say(f"\n{result_tables(result)}\n")
    for path in figures:
        say(f"figure: {path}")
    say(f"weights: {job.output / 'weights' / 'backbone.pkl'}")
    say(f"detector: {job.output / 'detector' / 'model_final.pth'}")
    say(f"report: {report}")

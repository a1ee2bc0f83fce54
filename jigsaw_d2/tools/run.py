"""``python -m jigsaw_d2 run``: the whole job on one's own data, from annotations to a detector."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from jigsaw_d2.io import ConfigError, write_text

if TYPE_CHECKING:  # torch takes seconds to import, and --help shall not
    from jigsaw_d2.tools.job import Job
    from jigsaw_d2.tools.pipeline import DetectionSet

EPILOG = """\
examples:
  python -m jigsaw_d2 run --json train.json --images DIR --val-json val.json --output OUT
  python -m jigsaw_d2 run --json train.json --images DIR --val-json val.json --output OUT --hours 2
  python -m jigsaw_d2 run ... --pretrain SOLVER.IMS_PER_BATCH 32 --detector SOLVER.MAX_ITER 5000

Call it again after an interruption: what is done is kept, a training goes on from its checkpoint.
"""


def say(text: str) -> None:
    """A line of progress, at once."""
    print(text, flush=True)


def add_file_arguments(parser: argparse._ActionsContainer, *, required: bool) -> None:
    """--json, --images, --val-json and --val-images."""
    parser.add_argument("--json", required=required, help="training annotations, COCO format")
    parser.add_argument("--images", required=required, help="image folder of --json")
    parser.add_argument("--val-json", required=required, help="held-out annotations")
    parser.add_argument("--val-images", help="image folder of --val-json; default: that of --json")


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
    parser.add_argument(
        "--config-file",
        help="of the pre-training; default: jigsaw_R_50.yaml, without a GPU jigsaw_R_18_cpu.yaml",
    )
    parser.add_argument(
        "--detector-config",
        help="of the detector; default: finetune/faster_rcnn_R_50_FPN_1x.yaml, without a GPU "
        "finetune/faster_rcnn_R_18_FPN_small.yaml",
    )
    parser.add_argument(
        "--with-scratch", action="store_true", help="the detector from scratch as well"
    )
    parser.add_argument("--seed", type=int, default=0, help="of every stage")
    parser.add_argument("--num-gpus", type=int, help="default: all of this machine")
    parser.add_argument("--pretrain", nargs="+", default=[], metavar="X", help="KEY VALUE pairs")
    parser.add_argument("--detector", nargs="+", default=[], metavar="X", help="KEY VALUE pairs")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run what is not done yet; print the tables, name the results."""
    args = build_parser().parse_args(argv)
    import torch

    from jigsaw_d2.tools.job import Job, default_configs

    pretrain, detector = default_configs(torch.cuda.is_available())
    job = Job(
        files_dataset(args),
        Path(args.output).resolve(),
        args.config_file or pretrain,
        args.detector_config or detector,
        tuple(args.pretrain),
        tuple(args.detector),
        seed=args.seed,
        num_gpus=args.num_gpus or max(1, torch.cuda.device_count()),
        with_scratch=args.with_scratch,
    )
    finish(job, None if args.hours is None else args.hours * 3600)
    return 0


def files_dataset(args: argparse.Namespace) -> "DetectionSet":
    """The dataset of --json, --images, --val-json and --val-images.

    Raises:
        ConfigError: one is missing.
        DataError: a file that does not exist.
    """
    from jigsaw_d2.tools.pipeline import DetectionSet

    if not (args.json and args.images and args.val_json):
        raise ConfigError("--json, --images and --val-json go together")
    train_json, images, val_json = (
        Path(part).resolve() for part in (args.json, args.images, args.val_json)
    )
    val_images = Path(args.val_images).resolve() if args.val_images else images
    name = train_json.parent.name if train_json.stem == "train" else train_json.stem
    return DetectionSet(name, train_json, images, val_json, val_images).checked()


def finish(job: "Job", seconds: float | None = None) -> None:
    """Run a job, draw its figures, write its report, print its tables."""
    from jigsaw_d2.tools.job import JobRunner, draw_figures, job_report, result_tables

    job.output.mkdir(parents=True, exist_ok=True)
    runner = JobRunner(job, say)
    result = runner.run(seconds)
    figures = draw_figures(runner.job, say)
    report = job.output / "report.md"
    write_text(report, job_report(runner.job, result, figures))
    say(f"\n{result_tables(result)}\n")
    for path in figures:
        say(f"figure: {path}")
    say(f"weights: {job.output / 'weights' / 'backbone.pkl'}")
    say(f"detector: {job.output / 'detector' / 'model_final.pth'}")
    say(f"report: {report}")

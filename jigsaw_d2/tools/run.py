"""``python -m jigsaw_d2 run``: the whole job on one's own data, from annotations to a detector."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from jigsaw_d2.io import ConfigError, write_text
from jigsaw_d2.tools.arguments import add_arrays, add_register, add_trust, make_parser

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


def add_file_arguments(parser: argparse._ActionsContainer, *, required: bool) -> None:
    """--json, --images, --val-json and --val-images."""
    add = parser.add_argument
    add("--json", required=required, help="training annotations, COCO format")
    add("--images", required=required, help="image folder of --json")
    add("--val-json", required=required, help="held-out annotations")
    add("--val-images", help="image folder of --val-json; default: that of --json")


def add_training_arguments(parser: argparse._ActionsContainer) -> None:
    """KEY VALUE pairs for both trainings, --register and --trust."""
    parser.add_argument("--pretrain", nargs="+", default=[], metavar="X", help="KEY VALUE pairs")
    parser.add_argument("--detector", nargs="+", default=[], metavar="X", help="KEY VALUE pairs")
    add_register(parser)
    add_trust(parser)


def build_parser() -> argparse.ArgumentParser:
    """Arguments of the command."""
    parser = make_parser("python -m jigsaw_d2 run", __doc__, EPILOG)
    add_file_arguments(parser, required=True)
    add = parser.add_argument
    add("--output", required=True, help="folder of everything that is made")
    text = "of wall-clock time: measures a few steps and sets both lengths"
    add("--hours", type=float, help=text)
    text = (
        "of the pre-training; default: jigsaw_R_50.yaml, without a GPU jigsaw_R_18_cpu.yaml, with "
    )
    text += "INPUT.JIGSAW.FIT_TO auto: template and scale fitted to the samples and the detector"
    add("--config-file", help=text)
    text = "of the detector; default: finetune/faster_rcnn_R_50_FPN_1x.yaml, without a GPU "
    add("--detector-config", help=text + "finetune/faster_rcnn_R_18_FPN_small.yaml")
    add_arrays(parser)
    add("--with-scratch", action="store_true", help="the detector from scratch as well")
    add("--seed", type=int, default=0, help="of every stage")
    add("--num-gpus", type=int, help="default: all of this machine")
    add_training_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run what is not done yet; print the tables, name the results."""
    args = build_parser().parse_args(argv)
    import torch

    from jigsaw_d2.tools.job import Job, default_configs
    from jigsaw_d2.tools.pipeline import Pipeline

    pretrain, detector = default_configs(torch.cuda.is_available())
    configs = (args.config_file or pretrain, args.detector_config or detector)
    gpus = args.num_gpus or max(1, torch.cuda.device_count())
    given = (gpus, tuple(args.register), args.trust, args.seed)
    pipeline = Pipeline(files_dataset(args), *configs, *given)
    fitted = () if args.config_file else ("INPUT.JIGSAW.FIT_TO", "auto")  # a named one says itself
    arrays, extraction = (), ()
    if args.channels or args.reader:
        arrays = ("INPUT.FORMAT", f"C{args.channels or 0}", "INPUT.READER", args.reader or "")
        extraction = ("--channels", str(args.channels))
        extraction += ("--reader", args.reader) if args.reader else ()
    overrides = ((*fitted, *arrays, *args.pretrain), (*arrays, *args.detector))
    job = Job(pipeline, Path(args.output).resolve(), *overrides, args.with_scratch, extraction)
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
    given = (args.json, args.images, args.val_json, args.val_images or args.images)
    paths = [Path(part).resolve() for part in given]
    name = paths[0].parent.name if paths[0].stem == "train" else paths[0].stem
    return DetectionSet(name, *paths)


def finish(job: "Job", seconds: float | None = None) -> None:
    """Run a job, draw its figures, write its report, print its tables."""
    from jigsaw_d2.tools.stages import exit_on_sigterm

    exit_on_sigterm()
    job.run(seconds)
    figures, report = job.draw_figures(), job.output / "report.md"
    write_text(report, job.report(figures))
    lines = [f"figure: {path}" for path in figures]
    lines += [f"weights: {job.output / 'weights' / 'backbone.pkl'}"]
    lines += [f"detector: {job.output / 'detector' / 'model_final.pth'}", f"report: {report}"]
    print(f"\n{job.tables()}\n", *lines, sep="\n", flush=True)

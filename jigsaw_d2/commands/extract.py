"""Cut the samples of a detection set into a store, and those of a held-out set into another."""

import argparse
import importlib
import logging
from pathlib import Path

from jigsaw_d2.cost import record_stage
from jigsaw_d2.extraction.extract import extract_samples
from jigsaw_d2.extraction.log import ExtractionError
from jigsaw_d2.extraction.options import CHOICES, UNCOMPRESSED_UP_TO, ExtractionOptions
from jigsaw_d2.extraction.report import format_report
from jigsaw_d2.extraction.sources import CocoSource, RegisteredSource, Source
from jigsaw_d2.extraction.workers import default_workers
from jigsaw_d2.sample_store import SampleStore
from jigsaw_d2.store.chunks import DEFAULT_QUALITY
from jigsaw_d2.data.template import JigsawTemplate
from jigsaw_d2.visualization.extraction_report import report_figure

FIGURE_NAME = "report.png"


def parse_part(text: str) -> tuple[int, int]:
    """ "2/4" -> (2, 4)."""
    try:
        number, parts = map(int, text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form i/n, e.g. 2/4") from None
    return number, parts


def parse_size(text: str) -> int:
    """Bytes of "64M", "1G" or a plain number."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    factor = units.get(text[-1:].upper(), 1)
    try:
        return int(float(text[:-1] if factor > 1 else text) * factor)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size, e.g. 256M") from None


def build_parser() -> argparse.ArgumentParser:
    """Every option with its default, from ``ExtractionOptions``."""
    parser = argparse.ArgumentParser(
        prog="extract_samples.py",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="An interrupted run is completed by the same command; finished shards are kept.",
    )
    _add_data_arguments(parser.add_argument_group("data"))
    _add_sample_arguments(parser.add_argument_group("samples"))
    run = parser.add_argument_group("run")
    run.add_argument(
        "--workers", type=int, default=default_workers(), help="processes; 0 = this one"
    )
    run.add_argument(
        "--part",
        type=parse_part,
        default=(1, 1),
        metavar="i/n",
        help="write one of n parts: one machine each",
    )
    run.add_argument("--strict", action="store_true", help="stop at the first fault in the input")
    run.add_argument("--overwrite", action="store_true", help="replace an existing store")
    run.add_argument("--cost-dir", help="folder of the compute ledger (default: that of --output)")
    return parser


def _add_data_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--json", help="COCO-format annotations")
    group.add_argument("--images", help="folder of their images")
    group.add_argument("--dataset", help="instead: name of a dataset registered with Detectron2")
    group.add_argument("--output", required=True, help="folder of the store to write")
    group.add_argument("--val-json", help="held-out annotations, extracted into --val-output")
    group.add_argument("--val-images", help="folder of their images (default: --images)")
    group.add_argument("--val-dataset", help="instead: name of a registered held-out dataset")
    group.add_argument("--val-output", help="held-out store (default: OUTPUT-val)")
    group.add_argument(
        "--register",
        metavar="MODULE",
        help="Python module to import first, which registers datasets",
    )


def _add_sample_arguments(group: argparse._ArgumentGroup) -> None:
    default = ExtractionOptions()
    group.add_argument("--seed", type=int, default=default.seed, help="same seed, same store")
    group.add_argument(
        "--enlarge",
        type=float,
        default=default.max_scale,
        help="a box's sides grow to at most this factor (Sec. 3.1); 1.0 = no context",
    )
    group.add_argument(
        "--negative-ratio",
        type=float,
        default=default.negative_ratio,
        help="negatives per positive over the dataset (Sec. 3.1: 1 to 10)",
    )
    group.add_argument(
        "--min-side", type=float, default=default.min_side, help="least box side, pixels"
    )
    group.add_argument(
        "--quality",
        type=int,
        help=f"of JPEGs, 1 to 100, and asks for them; where none is named, {DEFAULT_QUALITY}",
    )
    group.add_argument(
        "--encoding",
        choices=CHOICES,
        default=default.encoding,
        help="png is without loss; ppm, too, and need not be decoded, at ten times the bytes; auto "
        f"is ppm for samples of up to {UNCOMPRESSED_UP_TO >> 30} GiB, else jpeg",
    )
    group.add_argument(
        "--class-files", action="store_true", help="a .cls beside each sample: 1 KiB more of each"
    )
    group.add_argument("--shard-size", type=parse_size, default="256M", help="at most, e.g. 1G")
    group.add_argument(
        "--template",
        type=int,
        nargs=4,
        default=(224, 224, 64, 64),
        metavar=("H", "W", "Y", "X"),
        help="canvas and split that samples will be shown in, pixels",
    )
    group.add_argument(
        "--scale-range",
        type=float,
        nargs=2,
        default=default.scale_range,
        metavar=("LOW", "HIGH"),
        help="ratios that samples will be resized by (Sec. 4.1)",
    )


def make_source(json_file: str | None, images: str | None, dataset: str | None) -> Source | None:
    """The detection set that the arguments name; None where they name none.

    Raises:
        ExtractionError: both forms, or half of one.
    """
    if dataset and (json_file or images):
        raise ExtractionError("give either --json and --images or --dataset, not both")
    if dataset:
        return RegisteredSource(dataset)
    if json_file and images:
        return CocoSource(json_file, images)
    if json_file:
        raise ExtractionError("--json also needs --images, the folder of its images")
    return None


def options_from(args: argparse.Namespace) -> ExtractionOptions:
    """The options of a parsed command line."""
    return ExtractionOptions(
        seed=args.seed,
        max_scale=args.enlarge,
        negative_ratio=args.negative_ratio,
        quality=args.quality,
        encoding=args.encoding,
        class_files=args.class_files,
        min_side=args.min_side,
        shard_size=args.shard_size,
        template=JigsawTemplate(*args.template),
        scale_range=tuple(args.scale_range),
        part=args.part,
        workers=args.workers,
        strict=args.strict,
        overwrite=args.overwrite,
        progress=True,
    )


def main(argv: list[str] | None = None) -> int:
    """Extract the one or two stores; print each report."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = build_parser().parse_args(argv)
    if args.register:
        _register(args.register)
    source = make_source(args.json, args.images, args.dataset)
    if source is None:
        raise ExtractionError("name the data: --json A.json --images DIR, or --dataset NAME")
    held_out_images = args.val_images or (args.images if args.val_json else None)
    held_out = make_source(args.val_json, held_out_images, args.val_dataset)
    options = options_from(args)
    categories = _extract(source, args.output, options, args.cost_dir, None)
    if held_out is not None:
        output = args.val_output or f"{args.output.rstrip('/')}-val"
        _extract(held_out, output, options, args.cost_dir, categories)
    return 0


def _register(module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ExtractionError(f"--register: {module} cannot be imported: {error}") from error


def _extract(
    source: Source,
    output: str,
    options: ExtractionOptions,
    cost_dir: str | None,
    categories: list[str] | None,
) -> list[str]:
    """One store with its report on screen, its figure and its cost; returns its categories."""
    report = extract_samples(source, output, options, categories)
    folder = Path(report["path"])
    report_figure(report).savefig(folder / FIGURE_NAME, metadata={"Software": None})
    processes = max(options.workers or 0, 1)
    record_stage(
        cost_dir or Path(output).absolute().parent,
        "extraction",
        images=report["images_read"],
        pixels=report["pixels_read"],
        seconds=report["seconds"],
        device=f"CPU, {processes} processes",
    )
    rate = report["images_read"] / report["seconds"]
    print(
        f"\n{folder}: {source.name}, {report['images_read']} images in "
        f"{report['seconds']:.1f} s ({rate:.0f}/s)\n\n{format_report(report)}"
    )
    return SampleStore(folder).categories

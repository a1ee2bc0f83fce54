"""Cut the samples of a detection set into a store, and those of a held-out set into another."""

import argparse
import logging
from collections.abc import Callable
from dataclasses import astuple, fields
from pathlib import Path

from jigsaw_d2.data.extraction import (
    CHOICES,
    UNCOMPRESSED_UP_TO,
    ExtractionOptions,
    extract_samples,
)
from jigsaw_d2.data.report import format_report
from jigsaw_d2.data.sources import CocoSource, RegisteredSource
from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.data.store_format import DEFAULT_QUALITY
from jigsaw_d2.data.template import JigsawTemplate
from jigsaw_d2.data.workers import default_workers
from jigsaw_d2.io import ConfigError
from jigsaw_d2.tools import arguments


def part(text: str) -> tuple[int, int]:
    """ "2/4" -> (2, 4)."""
    number, parts = map(int, text.split("/"))
    return number, parts


def size(text: str) -> int:
    """Bytes of "64M", "1G" or a plain number."""
    power = "KMG".find(text[-1:].upper()) + 1
    return int(float(text[:-1] if power else text) * 1024**power)


def build_parser() -> argparse.ArgumentParser:
    """The data, and every field of ``ExtractionOptions``."""
    parser = argparse.ArgumentParser(
        prog="extract_samples.py",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="An interrupted run is completed by the same command; finished shards are kept.",
    )
    add = parser.add_argument_group("data").add_argument
    add_sources(add)
    add("--output", required=True, help="folder of the store to write")
    add("--val-output", help="held-out store (default: OUTPUT-val)")
    arguments.add_register(parser)
    samples = parser.add_argument_group("samples")
    add = samples.add_argument
    add("--seed", type=int, help="same seed, same store")
    text = "a box's sides grow to at most this factor (Sec. 3.1); 1.0 = no context"
    add("--enlarge", dest="max_scale", type=float, metavar="FACTOR", help=text)
    text = "negatives per positive over the dataset (Sec. 3.1: 1 to 10)"
    add("--negative-ratio", type=float, help=text)
    add("--min-side", type=float, help="least box side, pixels")
    text = f"of JPEGs, 1 to 100, and asks for them; where none is named, {DEFAULT_QUALITY}"
    add("--quality", type=int, help=text)
    text = "png is without loss; ppm, too, and need not be decoded, at ten times the bytes; auto "
    text += f"is ppm for samples of up to {UNCOMPRESSED_UP_TO >> 30} GiB, else jpeg"
    add("--encoding", choices=CHOICES, help=text)
    arguments.add_arrays(samples)
    text = "a .cls beside each sample: 1 KiB more of each"
    add("--class-files", action="store_true", help=text)
    add("--shard-size", type=size, help="at most, e.g. 1G")
    text = "canvas and split that samples will be shown in, pixels"
    add("--template", type=int, nargs=4, metavar=("H", "W", "Y", "X"), help=text)
    text = "ratios that samples will be resized by (Sec. 4.1)"
    add("--scale-range", type=float, nargs=2, metavar=("LOW", "HIGH"), help=text)
    text = (
        "MIN_SIZE_TRAIN and MAX_SIZE_TRAIN of the detector to come: the report names the template "
    )
    text += "that suits these samples and it (INPUT.JIGSAW.FIT_TO auto)"
    add("--detector-size", type=float, nargs=2, metavar=("MIN", "MAX"), help=text)
    add = parser.add_argument_group("run").add_argument
    add("--workers", type=int, help="processes; 0 = this one")
    add("--part", type=part, metavar="i/n", help="write one of n parts: one machine each")
    add("--strict", action="store_true", help="stop at the first fault in the input")
    add("--overwrite", action="store_true", help="replace an existing store")
    add("--cost-dir", help="folder of the cost log (default: the store)")
    defaults = {field.name: field.default for field in fields(ExtractionOptions)}
    defaults |= {"template": astuple(JigsawTemplate()), "shard_size": "256M"}
    parser.set_defaults(**{**defaults, "workers": default_workers(), "progress": True})
    return parser


def add_sources(add: Callable[..., object]) -> None:
    """The arguments that ``sources`` reads."""
    add("--json", help="COCO-format annotations")
    add("--images", help="folder of their images")
    add("--dataset", help="instead: name of a dataset registered with Detectron2")
    add("--val-json", help="held-out annotations")
    add("--val-images", help="folder of their images (default: --images)")
    add("--val-dataset", help="instead: name of a registered held-out dataset")


def sources(
    args: argparse.Namespace,
) -> tuple[CocoSource | RegisteredSource, CocoSource | RegisteredSource | None]:
    """The detection set that the arguments name, and the held-out one, if they name one.

    Raises:
        ConfigError: both forms, half of one, or none.
    """
    arguments.import_registered(args.register)
    source = make_source(args.json, args.images, args.dataset)
    if source is None:
        raise ConfigError("name the data: --json A.json --images DIR, or --dataset NAME")
    val_images = args.val_images or (args.images if args.val_json else None)
    return source, make_source(args.val_json, val_images, args.val_dataset)


def make_source(
    json_file: str | None, images: str | None, dataset: str | None
) -> CocoSource | RegisteredSource | None:
    """The detection set that the arguments name; None where they name none.

    Raises:
        ConfigError: both forms, or half of one.
    """
    if dataset and (json_file or images):
        raise ConfigError("give either --json and --images or --dataset, not both")
    if bool(json_file) != bool(images):
        raise ConfigError("--json also needs --images, the folder of its images, and the reverse")
    if dataset:
        return RegisteredSource(dataset)
    return CocoSource(json_file, images) if json_file else None


def options_from(args: argparse.Namespace) -> ExtractionOptions:
    """The options of a parsed command line."""
    given = {field.name: getattr(args, field.name) for field in fields(ExtractionOptions)}
    given |= {name: tuple(given[name]) for name in ("scale_range", "detector_size")}
    return ExtractionOptions(**{**given, "template": JigsawTemplate(*args.template)})


def main(argv: list[str] | None = None) -> int:
    """Extract the one or two stores; print each report."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = build_parser().parse_args(argv)
    source, held_out = sources(args)
    categories = _extract(source, args.output, args, None)
    if held_out is not None:
        _extract(held_out, args.val_output or f"{args.output.rstrip('/')}-val", args, categories)
    return 0


def _extract(
    source: CocoSource | RegisteredSource,
    output: str,
    args: argparse.Namespace,
    categories: list[str] | None,
) -> list[str]:
    """One store with its report on screen, its figure and its cost; returns its categories."""
    options = options_from(args)
    report = extract_samples(source, output, options, categories)
    # Not before the work, whose processes need neither torch nor matplotlib, nor for --help.
    from jigsaw_d2.cost import record_stage
    from jigsaw_d2.visualization.extraction_report import report_figure

    folder, seconds = Path(report["path"]), report["seconds"]
    report_figure(report).savefig(folder / "report.png", metadata={"Software": None})
    record_stage(
        args.cost_dir or output,
        "extraction",
        images=report["images_read"],
        pixels=report["pixels_read"],
        seconds=seconds,
        device=f"CPU, {max(options.workers, 1)} processes",
    )
    print(
        f"\n{folder}: {source.name}, {report['images_read']} images in {seconds:.1f} s "
        f"({report['images_read'] / seconds:.0f}/s)\n\n{format_report(report)}"
    )
    return SampleStore(folder).categories

"""Say what would be used of a detection set, and what skipped or mended, before any work is done.

The same reading serves extraction, fine-tuning and evaluation; nothing is written.
"""

import argparse

from jigsaw_d2.data.cleaning import check_objects, check_same_classes, clean_set, describe
from jigsaw_d2.data.extraction import ExtractionOptions
from jigsaw_d2.data.report import ExtractionLog
from jigsaw_d2.tools import arguments
from jigsaw_d2.tools.extract import add_sources, sources

EPILOG = """\
examples:
  python -m jigsaw_d2 check --json train.json --images DIR
  python -m jigsaw_d2 check --json train.json --images DIR --val-json val.json --strict

Status 0: extraction, fine-tuning and evaluation can use the sets. Status 2: they cannot, or with
--strict, there is a fault in them.
"""


def build_parser() -> argparse.ArgumentParser:
    """Arguments of the command."""
    parser = arguments.make_parser("python -m jigsaw_d2 check", __doc__, EPILOG)
    add_sources(parser.add_argument)
    arguments.add_arrays(parser)
    parser.add_argument("--strict", action="store_true", help="stop at the first fault")
    arguments.add_register(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print what is used, skipped and noticed of each set; refuse what no stage could use."""
    args = build_parser().parse_args(argv)
    options = ExtractionOptions(channels=args.channels or 0, reader=args.reader or "")
    classes = {}
    for held_out, source in enumerate(sources(args)):
        if source is None:
            continue
        clean = clean_set(source, ExtractionLog(args.strict), options.array_reader)
        clean.to_coco()  # notes what is missing for the evaluation
        name = getattr(source, "json_file", source.name)
        used = "is read as it is" if clean.is_as_it_was else "is cleaned as said above"
        print(f"{describe(name, clean)}\n\n{name} {used}; no file is changed\n", flush=True)
        check_objects(source.name, clean, held_out=bool(held_out))
        classes[f"{held_out and 'held-out ' or ''}{name}"] = clean.data.categories
    check_same_classes(classes)
    return 0

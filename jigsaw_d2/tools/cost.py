"""``python -m jigsaw_d2 cost RUN...``: what a run cost, beside ImageNet pre-training."""

import argparse
import sys

from jigsaw_d2.cost import format_cost_logs
from jigsaw_d2.tools.arguments import add_register, import_registered


def build_parser() -> argparse.ArgumentParser:
    """Arguments of the command."""
    parser = argparse.ArgumentParser(prog="python -m jigsaw_d2 cost", description=__doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder with a cost.json: a store, an OUTPUT_DIR; several are "
        "added up, as the stages of one result",
    )
    add_register(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    args = build_parser().parse_args(argv)
    import_registered(args.register)
    sys.stdout.write(format_cost_logs(args.runs) + "\n")
    return 0

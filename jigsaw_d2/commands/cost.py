"""``python -m jigsaw_d2 cost RUN...``: what a run cost, beside ImageNet pre-training."""

import argparse

from jigsaw_d2.cost_table import format_ledger


def build_parser() -> argparse.ArgumentParser:
    """Folders, nothing else."""
    parser = argparse.ArgumentParser(prog="python -m jigsaw_d2 cost", description=__doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder with a cost.json: a store, an OUTPUT_DIR; several are added up, as the stages "
        "of one result",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    print(format_ledger(build_parser().parse_args(argv).runs))
    return 0

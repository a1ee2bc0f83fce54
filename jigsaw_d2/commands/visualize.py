"""``visualize.py samples|jigsaw|erf|labels``: the method's figures, for any data and weights."""

import argparse
import importlib

FIGURES = {
    "samples": "samples of a store, with their boxes, classes and groups",
    "jigsaw": "Jigsaw images with regions, classes and used pixels (Fig. 4c)",
    "erf": "effective receptive fields of several weights side by side (Fig. 6)",
    "labels": "soft labels w_1..w_4 over the cells and the loss map (Fig. 5)",
}


def build_parser() -> argparse.ArgumentParser:
    """One sub-command a figure; each figure's module declares its own arguments."""
    parser = argparse.ArgumentParser(prog="visualize.py", description=__doc__)
    figures = parser.add_subparsers(dest="figure", required=True)
    for name, text in FIGURES.items():
        module = importlib.import_module(f"jigsaw_d2.visualization.{name}")
        sub = figures.add_parser(name, help=text, description=text)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Draw, then name every file written."""
    args = build_parser().parse_args(argv)
    for path in args.run(args):
        print(path)
    return 0

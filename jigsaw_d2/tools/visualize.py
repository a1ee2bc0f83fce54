"""``visualize.py samples|jigsaw|erf|labels``: the method's figures, for any data and weights."""

import argparse
import importlib

from jigsaw_d2.tools import arguments

FIGURES = {
    "samples": "samples of a store, with their boxes, classes and groups",
    "jigsaw": "Jigsaw images with regions, classes and used pixels (Fig. 4c)",
    "erf": "effective receptive fields of several weights side by side (Fig. 6)",
    "labels": "soft labels w_1..w_4 over the cells and the loss map (Fig. 5)",
}
ERF_GRADS = ("abs", "relu")


def build_parser() -> argparse.ArgumentParser:
    """One sub-command a figure."""
    parser = argparse.ArgumentParser(prog="visualize.py", description=__doc__)
    figures = parser.add_subparsers(dest="figure", required=True)
    adders = {
        "samples": _add_samples,
        "jigsaw": _add_jigsaw,
        "erf": _add_erf,
        "labels": _add_labels,
    }
    for name, text in FIGURES.items():
        sub = figures.add_parser(name, help=text, description=text)
        adders[name](sub)
        arguments.add_register(sub)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Draw, then name every file written."""
    args = build_parser().parse_args(argv)
    arguments.import_registered(args.register)
    figure = importlib.import_module(f"jigsaw_d2.visualization.{args.figure}")
    for path in figure.run(args):
        print(path)
    return 0


def _add_samples(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``visualize.py samples``."""
    parser.add_argument("store", nargs="+", help="store folder, or the parts of one")
    parser.add_argument("--output", default="samples.png", help="image to write")
    parser.add_argument("--count", type=int, default=48, help="samples shown")
    parser.add_argument("--seed", type=int, default=0, help="of the choice")
    parser.add_argument("--indices", type=int, nargs="+", help="show these samples instead")


def _add_jigsaw(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``visualize.py jigsaw``."""
    add = parser.add_argument
    add("store", nargs="+", help="store folder, or the parts of one")
    add("--config-file", default="", help="pre-training config (default: the paper's input)")
    add("--count", type=int, default=8, help="images shown")
    add("--first", type=int, default=0, help="number of the first image in the training stream")
    add("--seed", type=int, default=0, help="of the stream of images")
    add("--output", default="jigsaw.png", help="image to write")
    add("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="overrides")


def _add_erf(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``visualize.py erf``."""
    add = parser.add_argument
    add(
        "--config-file",
        nargs="+",
        required=True,
        help="one for all networks, or one each: paths, ours, or names in Detectron2's model zoo",
    )
    add(
        "--weights",
        nargs="+",
        default=["random"],
        help='checkpoints or weight files to compare; "random" is the initialisation (default)',
    )
    add("--names", nargs="+", default=[], help="of the rows; default: the weights' file names")
    add("--store", nargs="+", default=[], help="sample store(s): measure on Jigsaw images")
    add("--images", nargs="+", default=[], help="or on image files or folders; default: noise")
    add("--num-images", type=int, default=16, help="images to average over (default 16)")
    add(
        "--feature",
        nargs="+",
        default=[""],
        help="one for all networks, or one each; default: MODEL.JIGSAW.IN_FEATURE of the config",
    )
    add("--grad", choices=ERF_GRADS, default="abs", help="sign of gradients: abs counts both")
    add("--seed", type=int, default=0, help="of random weights, noise and Jigsaw images")
    add("--device", default="", help="cpu or cuda (default: a GPU where there is one)")
    add("--output", default="erf.png", help="figure; the shares go beside it as .json")
    # An option, as in Detectron2's demo: after a list of files, bare words would join the list.
    add(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides"
    )


def _add_labels(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``visualize.py labels``."""
    add = parser.add_argument
    add("--config-file", required=True, help="of the pre-training")
    add(
        "--weights", required=True, help="a checkpoint of it: network, classifier and label weights"
    )
    add(
        "--store", nargs="+", required=True, help="sample store(s) that the Jigsaw image comes from"
    )
    add("--position", type=int, nargs="+", default=[0], help="numbers of the images (default 0)")
    add("--seed", type=int, default=0, help="of the stream of images")
    add("--device", default="", help="cpu or cuda (default: a GPU where there is one)")
    add("--output", default="labels.png", help="figure; with several positions, -N is added")
    # An option, as in Detectron2's demo: after a list of files, bare words would join the list.
    add(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides"
    )

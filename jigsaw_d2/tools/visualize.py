"""``visualize.py samples|jigsaw|erf|labels``: the method's figures, for any data and weights."""

import argparse
import importlib

from jigsaw_d2.tools import arguments


def build_parser() -> argparse.ArgumentParser:
    """One sub-command a figure."""
    parser = argparse.ArgumentParser(prog="visualize.py", description=__doc__)
    figures = parser.add_subparsers(dest="figure", required=True)

    text = "samples of a store, with their boxes, classes and groups"
    samples = figures.add_parser("samples", help=text, description=text)
    samples.add_argument("store", nargs="+", help="store folder, or the parts of one")
    samples.add_argument("--count", type=int, default=48, help="samples shown")
    samples.add_argument("--indices", type=int, nargs="+", help="show these samples instead")

    text = "Jigsaw images with regions, classes and used pixels (Fig. 4c)"
    jigsaw = figures.add_parser("jigsaw", help=text, description=text)
    add = jigsaw.add_argument
    add("store", nargs="+", help="store folder, or the parts of one")
    add("--config-file", default="", help="pre-training config (default: the paper's input)")
    add("--count", type=int, default=8, help="images shown")
    add("--first", type=int, default=0, help="number of the first image in the training stream")

    text = "effective receptive fields of several weights side by side (Fig. 6)"
    erf = figures.add_parser("erf", help=text, description=text)
    add = erf.add_argument
    text = "one for all networks, or one each: paths, ours, or names in Detectron2's model zoo"
    add("--config-file", nargs="+", required=True, help=text)
    text = 'checkpoints or weight files to compare; "random" is the initialisation (default)'
    add("--weights", nargs="+", default=["random"], help=text)
    add("--names", nargs="+", default=[], help="of the rows; default: the weights' file names")
    add("--store", nargs="+", default=[], help="sample store(s): measure on Jigsaw images")
    add("--images", nargs="+", default=[], help="or on image files or folders; default: noise")
    add("--num-images", type=int, default=16, help="images to average over (default 16)")
    text = "one for all networks, or one each; default: all that the config classifies"
    add("--feature", nargs="+", default=[""], help=text)
    text = "sign of gradients: abs counts both"
    add("--grad", choices=("abs", "relu"), default="abs", help=text)

    text = "soft labels w_1..w_4 over the cells and the loss map (Fig. 5)"
    labels = figures.add_parser("labels", help=text, description=text)
    add = labels.add_argument
    add("--config-file", required=True, help="of the pre-training")
    text = "a checkpoint of it: network, classifier and label weights"
    add("--weights", required=True, help=text)
    text = "sample store(s) that the Jigsaw image comes from"
    add("--store", nargs="+", required=True, help=text)
    add("--position", type=int, nargs="+", default=[0], help="numbers of the images (default 0)")

    for name, sub in figures.choices.items():
        text = "figure to write; erf writes its shares beside it, as .json"
        sub.add_argument("--output", default=f"{name}.png", help=text)
        sub.add_argument("--seed", type=int, default=0, help="of everything drawn at random")
        arguments.add_register(sub)
    for sub in (erf, labels):
        sub.add_argument(
            "--device", default="", help="cpu or cuda (default: a GPU if there is one)"
        )
    for sub in (jigsaw, erf, labels):
        arguments.add_opts(sub)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Draw, then name every file written."""
    args = build_parser().parse_args(argv)
    arguments.import_registered(args.register)
    figure = importlib.import_module(f"jigsaw_d2.visualization.{args.figure}")
    for path in figure.run(args):
        print(path)
    return 0

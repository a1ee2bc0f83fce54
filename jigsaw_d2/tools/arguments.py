"""Arguments that several commands share."""

import argparse
import importlib
from collections.abc import Sequence

from jigsaw_d2.io import ConfigError


def make_parser(prog: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """A parser whose help keeps the lines of its texts."""
    texts = {"prog": prog, "description": description, "epilog": epilog}
    return argparse.ArgumentParser(**texts, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_register(parser: argparse._ActionsContainer) -> None:
    """--register MODULE, as often as wanted."""
    text = "Python module to import first, which registers backbones or datasets of your own"
    parser.add_argument("--register", action="append", default=[], metavar="MODULE", help=text)


def import_registered(modules: Sequence[str]) -> None:
    """Import the modules of --register, in each process that needs what they register.

    Raises:
        ConfigError: one cannot be imported.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(f"--register: {module} cannot be imported: {error}") from error


def add_arrays(parser: argparse._ActionsContainer) -> None:
    """--channels and --reader, of images that are no pictures."""
    text = "of images that are arrays (npy, tiff, png as they are), such as 4; 0: pictures"
    parser.add_argument("--channels", type=int, help=text)
    text = "reads an array of --channels instead"
    parser.add_argument("--reader", metavar="MODULE:FUNCTION", help=text)


def add_launch(parser: argparse.ArgumentParser) -> None:
    """Detectron2's launch arguments, by the same names."""
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs per machine")
    parser.add_argument("--num-machines", type=int, default=1, help="machines of the job")
    parser.add_argument("--machine-rank", type=int, default=0, help="which of them this is, from 0")
    parser.add_argument("--dist-url", default="auto", help="meeting point, tcp://HOST:PORT")


def add_trust(parser: argparse._ActionsContainer) -> None:
    """--trust."""
    text = "read configs (convert and erf: weights too) that could run code while they are read, "
    text += "and import the modules of --register that they keep; for your own alone"
    parser.add_argument("--trust", action="store_true", help=text)


def check_match_architecture(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """--match-architecture is refused where it would do nothing."""
    if args.match_architecture and args.config_file.endswith(".py"):
        parser.error(
            "--match-architecture is for YAML configs; a LazyConfig's network is changed by "
            "overrides such as model.backbone.bottom_up.stages.depth=18"
        )


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """KEY VALUE pairs, as Detectron2's own commands take them."""
    text = "overrides of the config"
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help=text)


def add_opts(parser: argparse.ArgumentParser) -> None:
    """--opts, as in Detectron2's demo: after a list of files, bare words would join the list."""
    text = "overrides of the config"
    add = parser.add_argument
    add("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help=text)

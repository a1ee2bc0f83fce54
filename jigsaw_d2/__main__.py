"""``python -m jigsaw_d2 COMMAND ...``: every command, from an installed package too."""

import importlib
import sys

from jigsaw_d2.tools import run_command

COMMANDS = {
    "run": "the whole job: extract, pre-train, convert, fine-tune, report",
    "check": "what would be used of a detection set, and what skipped, before any work",
    "extract": "cut samples out of a detection set into a store",
    "store": "check or summarise a sample store",
    "pretrain": "train a backbone on Jigsaw images",
    "convert": "turn a checkpoint into Detectron2 or torchvision weights",
    "finetune": "train a detector from converted weights",
    "visualize": "figures: samples, jigsaw, erf, labels",
    "erf": "effective receptive field of any Detectron2 backbone",
    "cost": "what runs cost, beside ImageNet pre-training",
}


def main(argv: list[str] | None = None) -> int:
    """Hand the rest of the command line to the command named first."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        lines = "\n".join(f"  {name:10} {text}" for name, text in COMMANDS.items())
        asked_for_help = bool(argv) and argv[0] in ("-h", "--help")
        out = sys.stdout if asked_for_help else sys.stderr
        out.write(
            f"usage: python -m jigsaw_d2 COMMAND ... (COMMAND --help tells more)\n\n{lines}\n"
        )
        return 0 if asked_for_help else 2
    command = importlib.import_module(f"jigsaw_d2.tools.{argv[0]}")
    return run_command(command.main, argv[1:])


if __name__ == "__main__":
    sys.exit(main())

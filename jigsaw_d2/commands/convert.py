"""``convert_weights.py``: checkpoint -> weights with passport, for Detectron2 or torchvision."""

import argparse
import sys

from jigsaw_d2.checkpoint import FORMATS, convert_checkpoint
from jigsaw_d2.detection.detection_config import changes_yaml, config_changes, load_detection_config
from jigsaw_d2.detection.plain_config import nest, plain_config, write_plain_config

EPILOG = """\
examples:
  convert_weights.py --input output/model_final.pth --output weights.pkl
  convert_weights.py --input output --output resnet50.pth --format torchvision
  convert_weights.py --input R-50.pkl --output imagenet.pkl
  convert_weights.py --input output --output weights.pkl \\
      --config-file COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml --write-config plain.yaml
"""


def build_parser() -> argparse.ArgumentParser:
    """Arguments of the command."""
    parser = argparse.ArgumentParser(
        prog="convert_weights.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input",
        required=True,
        help="checkpoint of Jigsaw pre-training or its run's folder; a converted file; ImageNet "
        "weights of torchvision or MSRA",
    )
    parser.add_argument(
        "--output", required=True, help=".pkl (numpy arrays) or .pth (tensors); YAML goes beside it"
    )
    parser.add_argument(
        "--format", choices=FORMATS, default="detectron2", help="default: %(default)s"
    )
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="unpickle anything in the input, which may run code from it; for your own files only",
    )
    parser.add_argument(
        "--write-config",
        metavar="OUT.yaml",
        help="write a config with which Detectron2's plain tools/train_net.py fine-tunes them",
    )
    parser.add_argument(
        "--config-file", default="", help="detection config for --write-config: zoo name or path"
    )
    parser.add_argument(
        "--match-architecture",
        action="store_true",
        help="for --write-config: take depth, groups, widths, deformable stages from the weights",
    )
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="overrides for --write-config, at the end of the line",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Convert; print the passport, the config that it demands, and the files written."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if bool(args.write_config) != bool(args.config_file):
        parser.error("--write-config and --config-file go together")
    if args.write_config and args.format != "detectron2":
        parser.error("--write-config is for weights in the detectron2 format")
    if args.opts and not args.write_config:
        parser.error(f"unexpected {' '.join(args.opts)}: overrides are for --write-config")
    passport = convert_checkpoint(
        args.input, args.output, format=args.format, force=args.force, trust=args.trust
    )
    out = sys.stdout
    out.write(f"# {args.output}: passport, also in {args.output}.yaml\n{passport.to_yaml()}")
    out.write(
        f"# a detector that uses these weights needs\n{changes_yaml(nest(passport.demands()))}"
    )
    if args.write_config:
        cfg = plain_config(
            args.config_file, args.output, args.opts, match_architecture=args.match_architecture
        )
        write_plain_config(args.write_config, cfg, force=args.force)
        before = load_detection_config(args.config_file, args.opts)
        changes = changes_yaml(config_changes(before, cfg))
        out.write(f"# {args.write_config}: {args.config_file} changed in\n{changes}")
    return 0

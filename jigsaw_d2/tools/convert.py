"""``convert_weights.py``: checkpoint -> weights with metadata, for Detectron2 and others."""

import argparse
import sys
from typing import TYPE_CHECKING

from jigsaw_d2.tools import arguments

if TYPE_CHECKING:  # torch takes seconds to import, and --help shall not
    from torch import nn

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
    parser = arguments.make_parser("convert_weights.py", __doc__, EPILOG)
    add = parser.add_argument
    text = "checkpoint of Jigsaw pre-training or its run's folder; a converted file; ImageNet "
    add("--input", required=True, help=text + "weights of torchvision or MSRA")
    text = ".pkl (numpy arrays) or .pth (tensors); YAML goes beside it"
    add("--output", required=True, help=text)
    formats = ("detectron2", "torchvision", "timm", "state_dict")
    add("--format", choices=formats, default=formats[0], help="default: %(default)s")
    add("--force", action="store_true", help="replace files that exist")
    add("--origin", default="", help="of torchvision weights that ImageNet did not train: whence")
    text = (
        "write a config with which Detectron2's plain tools/train_net.py fine-tunes them, or its "
    )
    text += "lazyconfig_train_net.py where --config-file is a LazyConfig"
    add("--write-config", metavar="OUT", help=text)
    text = "detection config for --write-config, which KEY VALUE pairs change: zoo name or path"
    add("--config-file", default="", help=text)
    text = "for --write-config: take depth, groups, widths, deformable stages from the weights"
    add("--match-architecture", action="store_true", help=text)
    arguments.add_trust(parser)
    arguments.add_register(parser)
    arguments.add_overrides(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Convert; print the metadata, the config that it requires, and the files written."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if bool(args.write_config) != bool(args.config_file):
        parser.error("--write-config and --config-file go together")
    if args.write_config and args.format != "detectron2":
        parser.error("--write-config is for weights in the detectron2 format")
    if args.opts and not args.write_config:
        parser.error(f"unexpected {' '.join(args.opts)}: overrides are for --write-config")
    arguments.check_match_architecture(parser, args)
    from jigsaw_d2.checkpoint.convert import convert_checkpoint
    from jigsaw_d2.detection import config

    arguments.import_registered(args.register)
    metadata = convert_checkpoint(
        *(args.input, args.output),
        **{name: getattr(args, name) for name in ("origin", "format", "force", "trust")},
    )
    out = sys.stdout
    out.write(f"# {args.output}: metadata, also in {args.output}.yaml\n{metadata.to_yaml()}")
    required = config.changes_yaml(metadata.required_config())
    out.write(f"# a detector that uses these weights needs\n{required}")
    if args.write_config:
        write_config(args, args.output, try_it=True)
    return 0


def write_config(
    args: argparse.Namespace, weights: str, insist: bool = False, try_it: bool = False
) -> None:
    """Write --write-config for ``weights``; print what they change in --config-file.

    ``insist``: overrides win over the weights. ``try_it``: load them into that detector first, and
    print what it finds new.
    """
    from jigsaw_d2.checkpoint.convert import check_free
    from jigsaw_d2.detection import config, lazy
    from jigsaw_d2.detection.finetune import FinetuneTrainer

    check_free(args.write_config, args.force)
    if args.config_file.endswith(".py"):
        given = (args.config_file, weights, args.opts, insist)
        if try_it:
            detector = lazy.build(lazy.load_lazy_config(*given), "model", args.config_file)
            try_load(detector, weights)
        changes = lazy.write_plain_config(args.write_config, *given) + "\n"
    else:
        cfg = config.setup_finetune(
            *(args.config_file, weights, args.opts),
            match_architecture=args.match_architecture,
            force=insist,
            trust=args.trust,
            here=False,
        )
        if try_it:
            cpu = cfg.clone()
            cpu.MODEL.DEVICE = "cpu"
            offsets = cfg.MODEL.JIGSAW.NEW_OFFSETS
            try_load(FinetuneTrainer.build_model(cpu), weights, new_offsets=offsets)
        config.write_plain_config(args.write_config, cfg, force=args.force)
        before = config.load_detection_config(args.config_file, args.opts, args.trust)
        changes = config.changes_yaml(config.config_changes(before, cfg))
    sys.stdout.write(f"# {args.write_config}: {args.config_file} changed in\n{changes}")


def try_load(detector: "nn.Module", weights: str, **options: bool) -> None:
    """Load ``weights`` strictly into the detector, and print what starts new there.

    Raises:
        WeightsError: see ``load_backbone``.
    """
    from jigsaw_d2.checkpoint.loading import load_backbone

    found = load_backbone(detector, weights, **options)
    new = ", ".join([*found.new_outputs, *found.new_offsets, *found.new_modules]) or "nothing"
    sys.stdout.write(f"# fills {len(found.filled)} tensors of that detector; new in it: {new}\n")

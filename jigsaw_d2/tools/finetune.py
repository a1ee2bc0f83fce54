"""``finetune_net.py``: train and evaluate a detector from converted weights."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from jigsaw_d2.tools import arguments
from jigsaw_d2.tools.convert import write_config

EPILOG = """\
examples:
  finetune_net.py --config-file COCO-Detection/faster_rcnn_R_50_C4_1x.yaml --weights weights.pkl
  finetune_net.py --config-file finetune/faster_rcnn_R_50_FPN_1x_jigsaw.yaml --weights weights.pkl
  finetune_net.py --config-file COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml --weights weights.pkl \\
      DATASETS.COCO_FILES '[["mine", "train.json", "images"], ["my_val", "val.json", "images"]]' \\
      DATASETS.TRAIN '("mine",)' DATASETS.TEST '("my_val",)' OUTPUT_DIR output/mine
"""


def build_parser() -> argparse.ArgumentParser:
    """Arguments of the command."""
    parser = arguments.make_parser("finetune_net.py", __doc__, EPILOG)
    add = parser.add_argument
    text = "detection config: name in Detectron2's zoo, one of ours (finetune/...), or a path; a "
    text += "LazyConfig (.py) takes KEY=VALUE overrides"
    add("--config-file", required=True, help=text)
    text = 'file of convert_weights.py; "none": from scratch, with a norm that trains; or a '
    text += "detector's checkpoint with its config.yaml beside it: go on from all its weights"
    add("--weights", required=True, help=text)
    text = "take depth, groups, widths, deformable stages from the weights, not from the config"
    add("--match-architecture", action="store_true", help=text)
    text = "write a config for Detectron2's own tools/train_net.py, of a LazyConfig for its "
    text += "lazyconfig_train_net.py, and train nothing"
    add("--write-config", metavar="OUT", help=text)
    add("--resume", action="store_true", help="go on with the run in OUTPUT_DIR")
    add("--eval-only", action="store_true", help="evaluate the last checkpoint in OUTPUT_DIR")
    text = "insist on overrides that contradict the weights, and load what fits of the weights"
    add("--force", action="store_true", help=text)
    arguments.add_launch(parser)
    arguments.add_trust(parser)
    arguments.add_register(parser)
    arguments.add_overrides(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Train, evaluate; print what the weights changed in the config, and name the results."""
    parser = build_parser()
    args = parser.parse_args(argv)
    arguments.check_match_architecture(parser, args)
    from jigsaw_d2.config import keep_registered
    from jigsaw_d2.detection import config
    from jigsaw_d2.engine.launch import launch_job

    arguments.import_registered(args.register)
    if args.write_config:
        write_config(args, args.weights, args.force)
        return 0
    machines = (args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
    if args.config_file.endswith(".py"):
        return launch_job(run_lazy, *machines, args=(args,)) or 0
    before = config.load_detection_config(args.config_file, args.opts, args.trust)
    cfg = config.setup_finetune(
        *(args.config_file, args.weights, args.opts),
        match_architecture=args.match_architecture,
        force=args.force,
        trust=args.trust,
    )
    is_first = os.environ.get("RANK", "0") == "0"  # torchrun starts this command once per GPU
    if is_first:
        changes = config.changes_yaml(config.config_changes(before, cfg))
        sys.stdout.write(f"# weights, dataset and machine change {args.config_file} in\n{changes}")
        sys.stdout.flush()
    keep_registered(cfg, args.register)
    cfg.freeze()
    timeout = cfg.SOLVER.PEER_TIMEOUT
    launch_job(run, *machines, args=(cfg, args), timeout=timeout, device=cfg.MODEL.DEVICE)
    results = Path(cfg.OUTPUT_DIR, "results.json")
    if is_first and results.is_file():
        sys.stdout.write(f"results: {results}\n")
    return 0


def run_lazy(args: argparse.Namespace) -> None:
    """The work of one process on a LazyConfig; writes what it reached to the screen."""
    from jigsaw_d2.detection import lazy

    arguments.import_registered(args.register)
    how = {"resume": args.resume, "eval_only": args.eval_only, "force": args.force}
    lazy.finetune(args.config_file, args.weights, args.opts, **how)


def run(cfg: Any, args: argparse.Namespace) -> None:
    """The work of one process, which knows nothing of another's registries."""
    from jigsaw_d2.config_files import import_kept
    from jigsaw_d2.detection.finetune import finetune

    arguments.import_registered(args.register)
    import_kept(cfg, args.config_file, args.trust)
    finetune(cfg, resume=args.resume, eval_only=args.eval_only, force=args.force)

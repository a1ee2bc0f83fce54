"""``finetune_net.py``: train and evaluate a detector from converted weights."""

import argparse
import os
import sys
from functools import partial

from detectron2.config import CfgNode

from jigsaw_d2.detection.detection_config import changes_yaml, config_changes, load_detection_config
from jigsaw_d2.detection.finetune_config import setup_finetune
from jigsaw_d2.detection.finetuning import finetune
from jigsaw_d2.training.launching import launch_job

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
    parser = argparse.ArgumentParser(
        prog="finetune_net.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config-file",
        required=True,
        help="detection config: name in Detectron2's zoo, one of ours (finetune/...), or a path",
    )
    parser.add_argument(
        "--weights",
        required=True,
        help='file of convert_weights.py, or "none": train from scratch with a norm that trains',
    )
    parser.add_argument(
        "--match-architecture",
        action="store_true",
        help="take depth, groups, widths, deformable stages from the weights, not from the config",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in OUTPUT_DIR")
    parser.add_argument(
        "--eval-only", action="store_true", help="evaluate the last checkpoint in OUTPUT_DIR"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="insist on overrides that contradict the passport, and load what fits of the weights",
    )
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs per machine")
    parser.add_argument("--num-machines", type=int, default=1, help="machines of the job")
    parser.add_argument("--machine-rank", type=int, default=0, help="which of them this is, from 0")
    parser.add_argument("--dist-url", default="auto", help="meeting point, tcp://HOST:PORT")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of the config"
    )
    return parser


def setup(args: argparse.Namespace) -> CfgNode:
    """The config of a parsed command line, frozen; what the passport changed goes to stdout."""
    before = load_detection_config(args.config_file, args.opts)
    cfg = setup_finetune(
        args.config_file,
        args.weights,
        args.opts,
        match_architecture=args.match_architecture,
        force=args.force,
    )
    if _is_first():
        changes = changes_yaml(config_changes(before, cfg))
        sys.stdout.write(f"# weights, dataset and machine change {args.config_file} in\n{changes}")
        sys.stdout.flush()
    cfg.freeze()
    return cfg


def main(argv: list[str] | None = None) -> int:
    """Train, evaluate, name the results."""
    args = build_parser().parse_args(argv)
    cfg = setup(args)
    job = partial(finetune, resume=args.resume, eval_only=args.eval_only, force=args.force)
    machines = (args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
    launch_job(
        *(job, *machines), args=(cfg,), timeout=cfg.SOLVER.PEER_TIMEOUT, device=cfg.MODEL.DEVICE
    )
    if _is_first():
        sys.stdout.write(f"results: {cfg.OUTPUT_DIR}/results.json\n")
    return 0


def _is_first() -> bool:
    """Whether this process speaks for the job: torchrun starts this command once per GPU."""
    return os.environ.get("RANK", "0") == "0"

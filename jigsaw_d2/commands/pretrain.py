"""``train_net.py``: pre-train a backbone on the Jigsaw images of a sample store.

    train_net.py --config-file configs/jigsaw_R_50.yaml --num-gpus 8 DATASETS.TRAIN "('STORE',)"

Started by itself it runs --num-gpus processes; under torchrun it is one of torchrun's.
"""

import argparse
import logging
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from jigsaw_d2.config import find_config, get_jigsaw_cfg
from jigsaw_d2.data.sources import register_coco_files
from jigsaw_d2.errors import JigsawError
from jigsaw_d2.trainer import JigsawTrainer
from jigsaw_d2.training.hooks import FirstBatchHook
from jigsaw_d2.training.launching import as_peer_lost, launch_job
from jigsaw_d2.training.replay import replay_step
from jigsaw_d2.training.run_config import open_store, resolve_config

logger = logging.getLogger(__name__)


class ExistingRunError(JigsawError, FileExistsError):
    """OUTPUT_DIR holds another run."""


def build_parser() -> argparse.ArgumentParser:
    """Detectron2's standard arguments, and --replay."""
    parser = default_argument_parser(epilog=__doc__)
    parser.prog = "train_net.py"
    parser.add_argument(
        "--replay",
        metavar="FILE",
        help="repeat the step that a run stopped at for a loss that was not finite, and say where "
        "the first value went wrong; KEY VALUE pairs change its config",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Train, evaluate or replay; in as many processes as asked for."""
    args = build_parser().parse_args(argv)
    if args.replay:
        print(format_replay(args.replay, args.opts))
        return 0
    timeout = load_config(args).SOLVER.PEER_TIMEOUT
    counts = (args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
    launch_job(run, *counts, args=(args,), timeout=timeout)
    return 0


def run(args: argparse.Namespace) -> None:
    """The work of one process."""
    cfg = setup(args)
    try:
        trainer = JigsawTrainer(cfg)
        if args.eval_only:
            evaluate_only(trainer, args.resume)
            return
        trainer.resume_or_load(resume=args.resume)
        if comm.is_main_process():
            trainer.register_hooks([FirstBatchHook()])
        trainer.train()
    except RuntimeError as error:
        lost = as_peer_lost(error, cfg.SOLVER.PEER_TIMEOUT)
        if lost is None:
            raise
        raise lost from error


def load_config(args: argparse.Namespace) -> CfgNode:
    """Config file and overrides as given, not yet resolved."""
    if args.config_file:
        args.config_file = str(find_config(args.config_file))
    return get_jigsaw_cfg(args.config_file, args.opts)


def setup(args: argparse.Namespace) -> CfgNode:
    """Resolved config, logger, seed; config.yaml is saved in OUTPUT_DIR, not by --eval-only.

    Raises:
        ExistingRunError: OUTPUT_DIR holds a run and this is a new one.
    """
    cfg = load_config(args)
    folder = Path(cfg.OUTPUT_DIR)
    if not (args.resume or args.eval_only) and comm.is_main_process():
        check_new(folder)
    comm.synchronize()
    setup_logger(
        str(folder), distributed_rank=comm.get_rank(), name="jigsaw_d2", abbrev_name="jigsaw"
    )
    register_coco_files(cfg)
    cfg = resolve_config(cfg, open_store(cfg), comm.get_world_size())
    if args.eval_only:
        setup_logger(str(folder), distributed_rank=comm.get_rank())
    else:
        default_setup(cfg, args)
    return cfg


def check_new(folder: Path) -> None:
    """Refuse a folder in which a run has left its traces.

    Raises:
        ExistingRunError: saying what is there and what to do.
    """
    for name in ("last_checkpoint", "metrics.json"):
        path = folder / name
        if path.is_file() and path.stat().st_size:
            raise ExistingRunError(
                f"OUTPUT_DIR {folder} holds a run ({name}); continue it with --resume, or choose "
                "another OUTPUT_DIR"
            )


def evaluate_only(trainer: JigsawTrainer, resume: bool) -> None:
    """Metrics of MODEL.WEIGHTS, or with --resume of OUTPUT_DIR's last checkpoint."""
    trainer.load_for_evaluation(resume)
    trainer.test(trainer.cfg, trainer.checkpointer.model)


def format_replay(path: str, overrides: list[str]) -> str:
    """What the repeated step gave, in words."""
    replay = replay_step(path, overrides)
    lines = [
        f"iteration {replay.iteration}: loss {replay.loss} (the run saw {replay.recorded_loss})",
        f"first module with an output that is not finite: {replay.first_bad_module or 'none'}",
    ]
    for names, what in (
        (replay.bad_parameters, "parameters not finite before the step"),
        (replay.bad_gradients, "gradients not finite"),
    ):
        lines.append(f"{what}: {len(names)} {', '.join(names[:5])}".rstrip())
    return "\n".join(lines)

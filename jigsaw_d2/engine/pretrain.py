"""A pre-training run from its arguments: what every process of ``train_net.py`` does."""

import argparse
import logging
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from jigsaw_d2.config import get_jigsaw_cfg, keep_registered
from jigsaw_d2.config_files import find_config
from jigsaw_d2.data.sources import register_coco_files
from jigsaw_d2.engine.hooks import FirstBatchHook
from jigsaw_d2.engine.launch import explained, lock_output
from jigsaw_d2.engine.run_config import check_held_out, open_store, resolve_config
from jigsaw_d2.engine.trainer import JigsawTrainer
from jigsaw_d2.io import ConfigError, RunError

logger = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> None:
    """The work of one process."""
    cfg = load_config(args)
    with lock_output(cfg.OUTPUT_DIR, args.eval_only), explained(cfg.SOLVER.PEER_TIMEOUT):
        cfg = setup(cfg, args)
        trainer = JigsawTrainer(cfg, explicit=args.opts[::2])
        if args.eval_only:
            evaluate_only(trainer, args.resume)
            return
        trainer.resume_or_load(resume=args.resume)
        if comm.is_main_process():
            trainer.register_hooks([FirstBatchHook()])
        trainer.train()


def load_config(args: argparse.Namespace) -> CfgNode:
    """Config file and overrides as given, not yet resolved."""
    if args.config_file:
        args.config_file = str(find_config(args.config_file))
    cfg = get_jigsaw_cfg(args.config_file, args.opts, trust=args.trust)
    cfg.SOLVER.DETERMINISTIC |= args.deterministic
    keep_registered(cfg, args.register)
    return cfg


def setup(cfg: CfgNode, args: argparse.Namespace) -> CfgNode:
    """Resolved config, logger, seed; config.yaml is saved in OUTPUT_DIR, not by --eval-only.

    Raises:
        RunError: OUTPUT_DIR holds a run and this is a new one.
    """
    folder = Path(cfg.OUTPUT_DIR)
    if not (args.resume or args.eval_only) and comm.is_main_process():
        check_new(folder)
    comm.synchronize()
    setup_logger(
        str(folder), distributed_rank=comm.get_rank(), name="jigsaw_d2", abbrev_name="jigsaw"
    )
    register_coco_files(cfg)
    store = open_store(cfg)
    check_held_out(cfg, store)
    cfg = resolve_config(cfg, store, comm.get_world_size(), args.opts[::2])
    if args.eval_only:
        setup_logger(str(folder), distributed_rank=comm.get_rank())
    else:
        default_setup(cfg, args)
    return cfg


def check_new(folder: Path) -> None:
    """Refuse a folder in which a run has left its traces.

    Raises:
        RunError: saying what is there and what to do.
    """
    for name in ("last_checkpoint", "metrics.json"):
        path = folder / name
        if path.is_file() and path.stat().st_size:
            raise RunError(
                f"OUTPUT_DIR {folder} holds a run ({name}); continue it with --resume, or choose "
                "another OUTPUT_DIR"
            )


def evaluate_only(trainer: JigsawTrainer, resume: bool) -> None:
    """Metrics of MODEL.WEIGHTS, or with --resume of OUTPUT_DIR's last checkpoint.

    Raises:
        ConfigError: there is nothing to evaluate on.
    """
    if not trainer.cfg.DATASETS.TEST:
        raise ConfigError("--eval-only: DATASETS.TEST names no held-out sample store")
    trainer.load_for_evaluation(resume)
    trainer.test(trainer.cfg, trainer.checkpointer.model)

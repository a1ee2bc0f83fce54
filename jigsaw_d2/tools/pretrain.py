"""``train_net.py``: pre-train a backbone on the Jigsaw images of a sample store.

    train_net.py --config-file configs/jigsaw_R_50.yaml --num-gpus 8 DATASETS.TRAIN "('STORE',)"

Started by itself it runs --num-gpus processes; under torchrun it is one of torchrun's.
"""

import argparse

from jigsaw_d2.tools import arguments


def build_parser() -> argparse.ArgumentParser:
    """Detectron2's standard arguments, and what this project adds."""
    parser = arguments.make_parser("train_net.py", __doc__)
    add = parser.add_argument
    add("--config-file", default="", help="of the pre-training: a path, or a name among ours")
    text = (
        "pre-train the backbone of this LazyConfig, a .py file or a name in Detectron2's zoo, from "
    )
    text += "below its pyramid; kept in the run's config"
    add("--backbone-from", metavar="X.py", help=text)
    add("--resume", action="store_true", help="go on with the run in OUTPUT_DIR")
    add("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS, or with --resume the run")
    text = "repeat the step that a run stopped at for a loss that was not finite, and say where "
    text += "the first value went wrong; KEY VALUE pairs change its config"
    add("--replay", metavar="FILE", help=text)
    text = "SOLVER.DETERMINISTIC True: a resumed run repeats the unbroken one bit for bit on GPUs "
    text += "too, at some cost in speed (on CPUs it does anyway)"
    add("--deterministic", action="store_true", help=text)
    arguments.add_launch(parser)
    arguments.add_register(parser)
    arguments.add_trust(parser)
    arguments.add_overrides(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Train, evaluate or replay; in as many processes as asked for."""
    args = build_parser().parse_args(argv)
    from jigsaw_d2.engine import pretrain
    from jigsaw_d2.engine.launch import launch_job

    arguments.import_registered(args.register)
    if args.backbone_from:
        named = ["MODEL.JIGSAW.BACKBONE_FROM", args.backbone_from, *args.opts]
        args.opts = ["MODEL.BACKBONE.NAME", "build_lazy_backbone", *named]
    if args.replay:
        print(format_replay(args.replay, args.opts, args.trust))
        return 0
    cfg = pretrain.load_config(args)
    counts = (args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
    settings = {"timeout": cfg.SOLVER.PEER_TIMEOUT, "device": cfg.MODEL.DEVICE}
    launch_job(run, *counts, args=(args,), **settings)
    return 0


def run(args: argparse.Namespace) -> None:
    """The work of one process, which knows what the others know."""
    from jigsaw_d2.engine import pretrain

    arguments.import_registered(args.register)
    pretrain.run(args)


def format_replay(path: str, overrides: list[str], trust: bool) -> str:
    """What the repeated step gave, in words."""
    from jigsaw_d2.engine.replay import replay_step

    replay = replay_step(path, overrides, trust)
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

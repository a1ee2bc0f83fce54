#!/usr/bin/env python
"""Initialisations of a detector at equal budget, over seeds, in one report (Tables 1-5, Fig. 7)."""

import argparse
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmark.plan import ABLATIONS, ARMS, BUDGETS, COSTS, PRESETS, Plan, parse_arm
from jigsaw_d2.io import ConfigError
from jigsaw_d2.tools import run_command
from jigsaw_d2.tools.arguments import import_registered, make_parser
from jigsaw_d2.tools.run import add_file_arguments, add_training_arguments, files_dataset

if TYPE_CHECKING:  # torch takes seconds to import, and --help shall not
    from benchmark.pool import Pool
    from jigsaw_d2.tools.pipeline import DetectionSet

EPILOG = """\
examples:
  compare.py --preset smoke --output OUT                             on the demo's own set
  compare.py --preset smoke --data FOLDER --output OUT               images/, train.json, val.json
  compare.py --preset small --data FOLDER --output OUT --minutes 9   call again to go on
  compare.py --preset small --data FOLDER --output OUT --ablation tau --dry-run
  compare.py --data FOLDER --output OUT --arms scratch jigsaw imagenet=imagenet.pkl --seeds 0 1 2
  compare.py --data FOLDER --output OUT --arms jigsaw scratch direct lightly \\
      --lightly-python lightly_env/bin/python
  compare.py --preset small --data FOLDER --output OUT --jobs 4      at once, on this machine's GPUs
  compare.py --preset paper --data FOLDER --output OUT --jobs 15 --cluster slurm --partition gpu \\
      --num-gpus 8
"""


def build_parser() -> argparse.ArgumentParser:
    """Arguments of the command."""
    parser = make_parser("compare.py", __doc__, EPILOG)
    presets = "; ".join(f"{name}: {plan.about}" for name, plan in PRESETS.items())
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="smoke", help=presets)
    add("--output", required=True, help="folder of runs and report; call again to go on")
    add("--minutes", type=float, help="start no further stage after as many minutes")
    add("--dry-run", action="store_true", help="list the arms and what they would cost")
    data = parser.add_argument_group("dataset (default: the demo's, drawn from a seed)")
    data.add_argument("--data", help="folder with images/, train.json and val.json")
    add_file_arguments(data, required=False)
    plan = parser.add_argument_group("what to compare (defaults come from the preset)")
    add = plan.add_argument
    add("--arms", nargs="+", metavar="ARM", help=ARMS)
    add("--ablation", choices=ABLATIONS, help="the arms of one of the paper's ablations")
    add("--seeds", nargs="+", type=int, help="one run of every arm each")
    add("--budget", choices=BUDGETS, help="equal total cost, or equal detection cost")
    add("--cost", choices=COSTS, help="what of the cost logs counts as cost")
    add("--pretrain-config", help="config of the pre-training")
    add("--detector-config", help="config of the detector")
    add("--pretrain-iterations", type=int, help="optimiser steps of pre-training")
    add("--detection-iterations", type=int, help="optimiser steps of the detector")
    add("--evaluations", type=int, help="of the detector, for the curves")
    add("--num-gpus", type=int, help="GPUs of each training")
    text = "one norm for all arms, that of random weights, and nothing frozen; by default each has "
    add("--same-norm", action="store_true", help=text + "the norm that the config gives its start")
    add("--lightly-python", metavar="PYTHON", help="of an environment with LightlyTrain")
    add("--lightly", nargs="+", metavar="KEY=VALUE", help="arguments of lightly_train.pretrain")
    add_training_arguments(plan)
    add = parser.add_argument_group("several runs at once (by submitit)").add_argument
    add("--jobs", type=int, default=1, help="at most as many; default: %(default)s")
    add("--cluster", choices=("local", "slurm"), default="local", help="where")
    add("--partition", help="of Slurm")
    add("--job-hours", type=float, default=24, help="of Slurm; jobs queue up again")
    add("--job-cpus", type=int, default=8, help="of Slurm, for each job")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run, report; 0 if every run is done, 1 if one failed or is still to do."""
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    from benchmark.runner import DONE, Comparison
    from jigsaw_d2.tools.stages import exit_on_sigterm

    if args.jobs < 1:
        raise ConfigError(f"--jobs is {args.jobs}: one run at a time is 1")
    import_registered(args.register)  # an objective of one's own, too
    plan = plan_from(args)
    output = Path(args.output).resolve()
    data = data_from(args, output)
    if args.dry_run:
        from benchmark.dry_run import dry_run_table, measure

        print(dry_run_table(plan, data.name, measure(plan, data)))
        return 0
    from benchmark.report import write_report

    exit_on_sigterm()
    comparison = Comparison(plan, data, output, args.minutes)
    command = shlex.join(["python", "compare.py", *argv])
    comparison.execute(lambda: write_report(comparison, command), pool_from(args, output))
    report = write_report(comparison, command)
    print(f"\n{report.read_text()}\nreport: {report}, {report.with_suffix('.json')}")
    return 0 if all(run.status == DONE for run in comparison.runs) else 1


def uses_gpu(args: argparse.Namespace) -> bool:
    """Whether the trainings run on GPUs: this machine's, or those asked of a cluster."""
    import torch

    return torch.cuda.is_available() or (args.cluster != "local" and bool(args.num_gpus))


def plan_from(args: argparse.Namespace) -> Plan:
    """The preset's plan with what the command line says otherwise; checked."""
    plan = PRESETS[args.preset]
    arms, device = plan.arms, ("MODEL.DEVICE", "cuda") if uses_gpu(args) else ()
    if args.ablation:
        arms = (*ABLATIONS[args.ablation], *(arm for arm in arms if arm.kind == "scratch"))
    if args.arms:
        arms = tuple(parse_arm(text) for text in args.arms)
    given = {name: value for name, value in vars(args).items() if value is not None}
    fields = {*vars(plan)} - {"preset", "arms", "seeds", "pretrain", "detector", "lightly"}
    plan = replace(
        plan,
        arms=arms,
        seeds=tuple(args.seeds or plan.seeds),
        pretrain=(*plan.pretrain, *device, *args.pretrain),
        detector=(*plan.detector, *device, *args.detector),
        lightly=tuple(args.lightly or ()),
        **{name: given[name] for name in fields & {*given}},
    )
    if plan.lightly_python:  # not resolved: an environment's is a link to another
        plan = replace(plan, lightly_python=os.path.abspath(plan.lightly_python))
    if plan.same_norm:
        plan = replace(plan, detector=(*plan.detector, *same_norm(plan)))
    return plan.checked()


def same_norm(plan: Plan) -> tuple[str, ...]:
    """KEY VALUE pairs that give every arm the norm with which scratch trains, and freeze nothing.

    Raises:
        ConfigError: the pre-trained backbones have another norm.
    """
    from jigsaw_d2.checkpoint.metadata import norm_family
    from jigsaw_d2.config import AUTO_NORM

    pipeline = plan.pipeline(None)
    model = pipeline.detector_cfg(plan.detector).MODEL
    norm = model.RESNETS.NORM
    norm = model.JIGSAW.SCRATCH_NORM if norm in ("FrozenBN", "") else norm
    trained = pipeline.pretrain_cfg(plan.pretrain).MODEL.RESNETS.NORM.replace(AUTO_NORM, "BN")
    if norm_family(norm) != norm_family(trained) and any(arm.kind == "jigsaw" for arm in plan.arms):
        raise ConfigError(
            f"--same-norm: scratch trains with {norm}, the pre-training with {trained}; give one "
            "of them the other's, such as --detector MODEL.JIGSAW.SCRATCH_NORM BN"
        )
    return ("MODEL.RESNETS.NORM", norm, "MODEL.BACKBONE.FREEZE_AT", "0")


def data_from(args: argparse.Namespace, output: Path) -> "DetectionSet":
    """The dataset that the command line names, or the demo's, drawn into ``output``."""
    from benchmark.demo_data import make_demo_set
    from jigsaw_d2.tools.pipeline import DetectionSet

    if args.data:
        return DetectionSet.from_folder(args.data)
    return files_dataset(args) if args.json else make_demo_set(output / "demo")


def pool_from(args: argparse.Namespace, output: Path) -> "Pool | None":
    """For several runs at once; None where one follows the other in this process."""
    if args.jobs == 1 and args.cluster == "local":
        return None
    from benchmark.pool import Pool

    slurm = None
    if args.cluster == "slurm":
        slurm = {"timeout_min": int(60 * args.job_hours), "cpus_per_task": args.job_cpus}
        slurm |= {"slurm_partition": args.partition} if args.partition else {}
    return Pool(output / "jobs", args.jobs, (args.num_gpus or 1) if uses_gpu(args) else 0, slurm)


if __name__ == "__main__":
    sys.exit(run_command(main))

"""``compare.py``: initialisations of a detector at equal budget, over seeds, in one report."""

import argparse
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import torch

from jigsaw_d2.commands.dataset_arguments import (
    add_file_arguments,
    demo_dataset,
    files_dataset,
    say,
)
from jigsaw_d2.comparison.dry_run import dry_run_table
from jigsaw_d2.comparison.plan import (
    ABLATIONS,
    BUDGETS,
    COSTS,
    PRESETS,
    Plan,
    ablation_arms,
    parse_arm,
    preset,
)
from jigsaw_d2.comparison.report import build_report, collect_configs, setting_differences
from jigsaw_d2.comparison.report_figures import write_figures
from jigsaw_d2.comparison.report_markdown import render
from jigsaw_d2.comparison.runner import DONE, Comparison
from jigsaw_d2.jobs.pipeline import DetectionSet

EPILOG = """\
examples:
  compare.py --preset smoke --output OUT                             on the demo's own set
  compare.py --preset smoke --data FOLDER --output OUT               images/, train.json, val.json
  compare.py --preset small --data FOLDER --output OUT --minutes 9   call again to go on
  compare.py --preset small --data FOLDER --output OUT --ablation tau --dry-run
  compare.py --data FOLDER --output OUT --arms scratch jigsaw imagenet=imagenet.pkl --seeds 0 1 2
"""


def build_parser() -> argparse.ArgumentParser:
    """Arguments of the command."""
    parser = argparse.ArgumentParser(
        prog="compare.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    presets = "; ".join(f"{name}: {plan.about}" for name, plan in PRESETS.items())
    parser.add_argument("--preset", choices=PRESETS, default="smoke", help=presets)
    parser.add_argument(
        "--output", required=True, help="folder of runs and report; call again to go on"
    )
    data = parser.add_argument_group("dataset (default: the demo's, drawn from a seed)")
    data.add_argument("--data", help="folder with images/, train.json and val.json")
    add_file_arguments(data, required=False)
    plan = parser.add_argument_group("what to compare (defaults come from the preset)")
    plan.add_argument(
        "--arms",
        nargs="+",
        metavar="ARM",
        help="scratch, scratch-again, jigsaw[:OBJECTIVE], NAME=FILE.pkl",
    )
    plan.add_argument(
        "--ablation", choices=ABLATIONS, help="the arms of one of the paper's ablations"
    )
    plan.add_argument("--seeds", nargs="+", type=int, help="one run of every arm each")
    plan.add_argument("--budget", choices=BUDGETS, help="equal total cost, or equal detection cost")
    plan.add_argument("--cost", choices=COSTS, help="what of the ledger counts as cost")
    plan.add_argument("--pretrain-config", help="config of the pre-training")
    plan.add_argument("--detector-config", help="config of the detector")
    plan.add_argument("--pretrain-iterations", type=int, help="optimiser steps of pre-training")
    plan.add_argument("--detection-iterations", type=int, help="optimiser steps of the detector")
    plan.add_argument("--evaluations", type=int, help="of the detector, for the curves")
    plan.add_argument("--pretrain", nargs="+", default=[], metavar="X", help="KEY VALUE pairs")
    plan.add_argument("--detector", nargs="+", default=[], metavar="X", help="KEY VALUE pairs")
    plan.add_argument("--num-gpus", type=int, help="GPUs of each training")
    parser.add_argument(
        "--minutes", type=float, help="start no further stage after as many minutes"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list the arms and what they would cost"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run, report; 0 if every run is done, 1 if one failed or is still to do."""
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(argv)
    plan = plan_from(args)
    output = Path(args.output).resolve()
    data = data_from(args, output)
    if args.dry_run:
        sys.stdout.write(dry_run_table(plan, data) + "\n")
        return 0
    comparison = Comparison(plan, data, output, say, minutes=args.minutes)
    command = shlex.join(["python", "-m", "jigsaw_d2", "compare", *argv])
    comparison.execute(lambda: write_report(comparison, command))
    report = write_report(comparison, command)
    sys.stdout.write(f"\n{report.read_text()}\nreport: {report}, {report.with_suffix('.json')}\n")
    return 0 if all(run.status == DONE for run in comparison.runs) else 1


def plan_from(args: argparse.Namespace) -> Plan:
    """The preset's plan with what the command line says otherwise.

    Raises:
        ComparisonError: see ``Plan.checked``.
    """
    plan = preset(args.preset, on_gpu=torch.cuda.is_available())
    arms = plan.arms
    if args.ablation:
        arms = (*ablation_arms(args.ablation), *(arm for arm in arms if arm.kind == "scratch"))
    if args.arms:
        arms = tuple(parse_arm(text) for text in args.arms)
    names = ("budget", "cost", "pretrain_config", "detector_config", "pretrain_iterations")
    names += ("detection_iterations", "evaluations", "num_gpus")
    said = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return replace(
        plan,
        arms=arms,
        seeds=tuple(args.seeds or plan.seeds),
        pretrain=(*plan.pretrain, *args.pretrain),
        detector=(*plan.detector, *args.detector),
        **said,
    ).checked()


def data_from(args: argparse.Namespace, output: Path) -> DetectionSet:
    """The dataset that the command line names, or the demo's, drawn into ``output``.

    Raises:
        PipelineError: files that do not exist.
    """
    if args.data:
        return DetectionSet.from_folder(args.data)
    if args.json:
        return files_dataset(args)
    return demo_dataset(output / "demo")


def write_report(comparison: Comparison, command: str) -> Path:
    """Write report.md, report.json and figures/ into the comparison's folder; path of the first."""
    folder = comparison.output
    folder.mkdir(parents=True, exist_ok=True)
    report = build_report(comparison.plan, comparison.data, comparison.runs, folder, command)
    report["configs"] = collect_configs(comparison, folder)
    report["detector_differences"] = setting_differences(comparison)
    (folder / "report.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    path = folder / "report.md"
    path.write_text(render(report, write_figures(report, folder)))
    return path

"""Figures of a comparison: AP over cost, and AP of every single run."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from jigsaw_d2.comparison.runner import DONE

UNITS = {"seconds": (1.0, "device seconds"), "flops": (1e15, "backbone PFLOPs")}
BEFORE = ("extraction", "pretraining", "erf_refresh")


def curve_figure(report: dict) -> Figure:
    """AP over total cost, one line a run; pre-training shifts a line to the right."""
    scale, label = UNITS[report["cost_unit"]]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, arm in enumerate(report["arms"]):
        named = False
        for run in arm["runs"]:
            points = cost_curve(run, report["cost_unit"])
            if not points:
                continue
            costs, scores = zip(*points)
            name = None if named else arm["name"]
            costs = [cost / scale for cost in costs]
            axes.plot(costs, scores, "o-", color=f"C{number}", alpha=0.7, markersize=4, label=name)
            named = True
    axes.set(xlabel=f"total cost, {label}", ylabel="box AP, %", title=report["dataset"]["name"])
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    return figure


def cost_curve(run: dict, unit: str) -> list[tuple[float, float]]:
    """(total cost up to then, AP in percent) of each evaluation; empty for an unfinished run."""
    if run["status"] != DONE:
        return []
    before = sum(run["costs"].get(stage, {}).get(unit, 0.0) for stage in BEFORE)
    step = run["costs"]["finetuning"][unit] / run["iterations"]["detection"]
    return [(before + step * done, ap) for done, ap in run["curve"]]


def seeds_figure(report: dict) -> Figure:
    """AP of every finished run, one column an arm, with the mean and its 95 % interval."""
    figure = Figure(figsize=(1.5 + 1.4 * len(report["arms"]), 4), layout="constrained")
    axes = figure.subplots()
    for number, arm in enumerate(report["arms"]):
        scores = [run["metrics"].get("AP") for run in arm["runs"] if run["status"] == DONE]
        scores = [score for score in scores if score is not None]
        axes.plot([number] * len(scores), scores, "o", color=f"C{number}", alpha=0.6)
        summary = arm["summary"]["AP"]
        if summary is not None:
            error = summary["half_width"] or 0.0
            axes.errorbar(
                [number + 0.15],
                [summary["mean"]],
                yerr=[error],
                color="black",
                capsize=4,
                marker="_",
            )
    axes.set_xticks(
        range(len(report["arms"])), [arm["name"].replace(" ", "\n") for arm in report["arms"]]
    )
    axes.set(ylabel="box AP, %", title=f"{report['dataset']['name']}: runs, mean, 95 % interval")
    axes.grid(axis="y", alpha=0.3)
    return figure


def write_figures(report: dict, folder: Path) -> Sequence[str]:
    """Write both as PNG into ``folder``/figures; their paths relative to ``folder``."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    names = ("figures/ap_over_cost.png", "figures/ap_by_seed.png")
    for name, figure in zip(names, (curve_figure(report), seeds_figure(report))):
        figure.savefig(folder / name, dpi=110)
    return names

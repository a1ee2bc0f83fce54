"""What a comparison found: one JSON-able dict, its Markdown and its figures.

Nothing is left out, no failure either. Few seeds are the rule, so the intervals are wide, and ought
to be: with three seeds Student's factor before the standard error is 4.3, with two it is 12.7.
"""

import json
import platform
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from statistics import fmean

import scipy.stats
import torch
import yaml
from matplotlib.figure import Figure
from tabulate import tabulate

from benchmark.runner import DONE, Comparison, Run
from jigsaw_d2 import __version__
from jigsaw_d2.cost import device_name
from jigsaw_d2.io import write_text
from jigsaw_d2.tools.stages import DetectionSet, flat

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
PACKAGES = ("torch", "torchvision", "detectron2", "numpy", "opencv-python-headless", "pycocotools")
UNITS = {"seconds": (1.0, "device seconds"), "flops": (1e15, "backbone PFLOPs")}
BEFORE = ("extraction", "pretraining", "erf_refresh")
OWN_SETTINGS = ("MODEL.WEIGHTS", "SEED", "OUTPUT_DIR")  # what makes an arm and a run


def write_report(comparison: Comparison, command: str) -> Path:
    """Write report.md, report.json and figures/ into the comparison's folder; path of the first."""
    folder = comparison.output
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    report = build_report(comparison, command)
    figures = {"ap_over_cost": curve_figure(report), "ap_by_seed": seeds_figure(report)}
    for name, figure in figures.items():
        figure.savefig(folder / "figures" / f"{name}.png", dpi=110)
    path = folder / "report.md"
    write_text(path.with_suffix(".json"), json.dumps(report, indent=1, allow_nan=False) + "\n")
    write_text(path, render(report, [f"figures/{name}.png" for name in figures]))
    return path


def build_report(comparison: Comparison, command: str = "") -> dict:
    """The report of a comparison, finished or not.

    Paths below its output and the dataset's are written as OUTPUT and DATA, so that a report can be
    published, and its commands typed elsewhere.
    """
    plan, runs = comparison.plan, comparison.runs
    short = _shortener(comparison.data, comparison.output)
    arms = [
        {
            "name": arm.name,
            "kind": arm.kind,
            "runs": [_run(run, short) for run in runs if run.arm == arm],
            "summary": {
                metric: interval([*_values(runs, arm.name, metric).values()]) for metric in METRICS
            },
        }
        for arm in dict.fromkeys(run.arm for run in runs)
    ]
    return {
        "version": 2,
        "preset": plan.preset,
        "about": plan.about,
        "command": short(command),
        "dataset": dataset_facts(comparison.data),
        "budget": plan.budget,
        "cost_unit": plan.cost,
        "seeds": list(plan.seeds),
        "pretrain_config": short(plan.pretrain_config),
        "detector_config": short(plan.detector_config),
        "pretrain_overrides": list(plan.pretrain),
        "detector_overrides": list(plan.detector),
        "arms": arms,
        "differences": differences(runs),
        "detector_differences": setting_differences(comparison),
        "environment": environment(),
    }


def _shortener(data: DetectionSet, output: Path) -> Callable[[str], str]:
    """Replaces the paths of this machine by OUTPUT, DATA and IMAGES, the longest first."""
    names = {str(data.train_images): "IMAGES", str(data.train_json.parent): "DATA"}
    names[str(output)] = "OUTPUT"
    if data.train_images.parent == data.train_json.parent:
        del names[str(data.train_images)]

    def short(text: str) -> str:
        for path in sorted(names, key=len, reverse=True):
            text = text.replace(path, names[path])
        return text

    return short


def _run(run: Run, short: Callable[[str], str]) -> dict:
    same = ("seed", "status", "metrics", "curve", "iterations", "costs")
    commands = [short(command) for command in run.commands]
    facts = {name: getattr(run, name) for name in same}
    return {**facts, "error": short(run.error), "commands": commands}


def _values(runs: Sequence[Run], arm: str, metric: str) -> dict[int, float]:
    """{index of the seed: value} of an arm's finished runs for which the metric is defined."""
    done = [run for run in runs if run.arm.name == arm and run.status == DONE]
    values = {run.index: run.metrics.get(metric) for run in done}
    return {index: value for index, value in values.items() if value is not None}


def interval(values: Sequence[float]) -> dict | None:
    """Mean and half width of its 95 % interval by Student's t; None without values.

    Returns:
        {"mean", "half_width", "count", "covers_zero"}; a single value has no interval: two Nones.
    """
    if not values:
        return None
    mean, half = fmean(values), None
    if len(values) > 1:
        half = float(scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values))
    covers = None if half is None else abs(mean) <= half
    return {"mean": mean, "half_width": half, "count": len(values), "covers_zero": covers}


def differences(runs: Sequence[Run]) -> list[dict]:
    """Paired differences of AP and AP50 over the seeds that both arms of a pair have finished.

    Arms from scratch are subtracted from the others, so that a positive number speaks for
    pre-training, and the A/A copy has scratch subtracted.
    """
    arms = list(dict.fromkeys(run.arm for run in runs))
    arms.sort(key=lambda arm: (arm.kind != "scratch", arm.kind == "scratch" and arm.seed_offset))
    found = []
    for i, theirs in enumerate(arms):
        for ours in arms[i + 1 :]:
            entry: dict = {"ours": ours.name, "theirs": theirs.name}
            for metric in ("AP", "AP50"):
                own, other = (_values(runs, arm.name, metric) for arm in (ours, theirs))
                entry[metric] = interval([own[i] - other[i] for i in sorted(own.keys() & other)])
            found.append(entry)
    return found


def setting_differences(comparison: Comparison) -> dict[str, dict[str, str]]:
    """Key -> {arm: value} of every detector setting in which the arms' saved configs differ."""
    settings: dict[str, dict] = {}
    for run in comparison.runs:
        path = comparison.folder(run) / "detector" / "config.yaml"
        if run.status == DONE and run.arm.name not in settings:
            settings[run.arm.name] = flat(yaml.safe_load(path.read_text()))
    keys = {key for tree in settings.values() for key in tree} - set(OWN_SETTINGS)
    found = {k: {arm: str(tree.get(k)) for arm, tree in settings.items()} for k in sorted(keys)}
    return {key: values for key, values in found.items() if len(set(values.values())) > 1}


def environment() -> dict[str, str]:
    """Versions and hardware, without names of machines or people."""
    facts = {"jigsaw_d2": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "not installed as a distribution"
    facts["device"] = device_name("cuda" if torch.cuda.is_available() else "cpu")
    return {**facts, "platform": f"{sys.platform} {platform.machine()}"}


def dataset_facts(data: DetectionSet) -> dict:
    """Name, counts and categories of a dataset."""
    facts: dict = {"name": data.name}
    for split, path in (("train", data.train_json), ("val", data.val_json)):
        document = json.loads(path.read_text())
        facts[split] = {key: len(document[key]) for key in ("images", "annotations")}
        facts["categories"] = [entry["name"] for entry in document["categories"]]
    return facts


def render(report: dict, figures: Sequence[str] = ()) -> str:
    """Markdown of ``build_report``'s dict; ``figures`` are paths relative to it."""
    parts = [
        _head(report),
        "## Box AP on the held-out images\n\n" + results_table(report),
        "## Paired differences\n\n" + differences_table(report),
        settings_text(report),
        "## Every run\n\n" + runs_table(report),
        "## Cost\n\n" + cost_table(report),
        *(f"![{name}]({name})" for name in figures),
        "## Commands\n\n" + _commands(report),
        "## Versions and hardware\n\n" + table(["what", "which"], report["environment"].items()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of texts."""
    return tabulate(rows, head, tablefmt="pipe", disable_numparse=True)


def _head(report: dict) -> str:
    data = report["dataset"]
    counts = ", ".join(
        f"{split} {data[split]['images']} images, {data[split]['annotations']} annotations"
        for split in ("train", "val")
    )
    missing = sum(run["status"] != DONE for arm in report["arms"] for run in arm["runs"])
    state = f"\n\n**{missing} run(s) failed or did not run yet; see below.**" if missing else ""
    return (
        f"# Comparison on {data['name']}, preset {report['preset']}\n\n"
        f"{data['name']}: {counts}, {len(data['categories'])} classes. Seeds "
        f"{', '.join(map(str, report['seeds']))}. Budget: {budget_text(report)}. Every arm's "
        f"detector: `{report['detector_config']}` {_inline(report['detector_overrides'])}; "
        f"pre-training: `{report['pretrain_config']}` {_inline(report['pretrain_overrides'])}.\n\n"
        f"Made by `{report['command']}`{state}"
    )


def budget_text(report: dict) -> str:
    """The rule that set the lengths, as far as the runs that finished bear it out."""
    if report["budget"] == "detection":
        return "equal detection cost, as in Table 3: all arms have the same detection iterations"
    jigsaw = [run for arm in report["arms"] if arm["kind"] == "jigsaw" for run in arm["runs"]]
    if not jigsaw:
        return "no arm pre-trains here, so all have the same detection iterations"
    if all(run["status"] != DONE for run in jigsaw):
        return "none yet: no Jigsaw run has finished, so nothing here is at equal total cost"
    return (
        "equal total cost, as in Table 5: a run from scratch trains longer by what the Jigsaw run "
        f"of its seed cost before detection, counted in {report['cost_unit']} of the ledger"
    )


def _inline(overrides: list[str]) -> str:
    return f"with `{' '.join(overrides)}`" if overrides else "as it is"


def results_table(report: dict) -> str:
    """Mean and 95 % interval over seeds of each metric, one row an arm."""
    rows = []
    for arm in report["arms"]:
        done = sum(run["status"] == DONE for run in arm["runs"])
        cells = [_mean(arm["summary"][metric]) for metric in METRICS]
        rows.append([arm["name"], f"{done} of {len(arm['runs'])}", *cells])
    return table(["arm", "seeds", *METRICS], rows) + (
        "\n\nMean over seeds ± half width of the 95 % interval (Student's t). "
        "\\- : not defined, such as APl without large objects, or no finished run."
    )


def _mean(found: dict | None) -> str:
    if found is None:
        return "-"
    half = "(one seed)" if found["half_width"] is None else f"± {found['half_width']:.2f}"
    return f"{found['mean']:.2f} {half}"


def differences_table(report: dict) -> str:
    """Paired differences over seeds, and whether zero lies within the interval."""
    rows = [
        [f"{d['ours']} − {d['theirs']}", _mean(d["AP"]), _mean(d["AP50"]), verdict(d["AP"])]
        for d in report["differences"]
    ]
    if not rows:
        return "A single arm has nothing to differ from."
    text = table(["difference", "AP", "AP50", "verdict on AP"], rows)
    if any(arm["name"] == "scratch again" for arm in report["arms"]):
        text += (
            '\n\n"scratch again − scratch" is the A/A test: the same arm twice with other seeds. '
            "What it shows is chance alone, and no smaller difference means anything."
        )
    return text


def verdict(found: dict | None) -> str:
    """One phrase on whether a difference is told apart from chance."""
    if found is None:
        return "no common seeds finished"
    if found["half_width"] is None:
        return "one seed: no interval"
    if found["covers_zero"]:
        return "interval covers zero: not told apart from chance"
    return "above zero" if found["mean"] > 0 else "below zero"


def settings_text(report: dict) -> str:
    """In which settings the arms' detectors differ."""
    if not report["detector_differences"]:
        return "The finished arms' detector configs are identical but for weights, seed and folder."
    names = [arm["name"] for arm in report["arms"]]
    rows = [
        [f"`{key}`", *(values.get(name, "-") for name in names)]
        for key, values in report["detector_differences"].items()
    ]
    return (
        "The arms' saved detector configs differ, beside weights, seed and folder, in:\n\n"
        + table(["detector setting", *names], rows)
    )


def runs_table(report: dict) -> str:
    """One row a run, the others than finished ones with their reason."""
    rows = []
    for arm in report["arms"]:
        for run in arm["runs"]:
            status = run["status"] + (f": {run['error']}" if run["error"] else "")
            lengths = [run["iterations"].get(key, "-") for key in ("pretraining", "detection")]
            scores = [run["metrics"].get(key) for key in ("AP", "AP50")]
            scores = ["-" if score is None else f"{score:.2f}" for score in scores]
            rows.append([arm["name"], run["seed"], status.replace("|", "/"), *lengths, *scores])
    lengths = ("pre-training iterations", "detection iterations")
    return table(["arm", "seed", "status", *lengths, "AP", "AP50"], rows)


def cost_table(report: dict) -> str:
    """The ledger, mean over the finished runs of each arm."""
    stages = (*BEFORE, "finetuning")
    rows = []
    for arm in report["arms"]:
        done = [run["costs"] for run in arm["runs"] if run["status"] == DONE]
        mean = {
            unit: [fmean(costs.get(s, {}).get(unit, 0.0) for costs in done) for s in stages]
            for unit in (UNITS if done else ())
        }
        seconds = [*mean["seconds"], sum(mean["seconds"])] if done else [0] * 5
        flops = f"{sum(mean['flops']) / 1e15:.3f}" if done else "-"
        rows.append([arm["name"], *(f"{s:.0f} s" if s else "-" for s in seconds), flops])
    return (
        table(["arm", *stages, "total", "backbone PFLOPs"], rows)
        + "\n\nDevice seconds without start-up and evaluation, mean over finished runs."
    )


def _commands(report: dict) -> str:
    return "\n\n".join(
        f"{arm['name']}, seed {run['seed']}:\n\n```\n" + "\n".join(run["commands"]) + "\n```"
        for arm in report["arms"]
        if (run := arm["runs"][0])["commands"]
    )


def curve_figure(report: dict) -> Figure:
    """AP over total cost, one line a run; pre-training shifts a line to the right."""
    scale, label = UNITS[report["cost_unit"]]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, arm in enumerate(report["arms"]):
        curves = [cost_curve(run, report["cost_unit"]) for run in arm["runs"]]
        for first, points in enumerate(filter(None, curves)):
            costs, scores = zip(*((cost / scale, ap) for cost, ap in points))
            name = None if first else arm["name"]
            axes.plot(costs, scores, "o-", color=f"C{number}", alpha=0.7, markersize=4, label=name)
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
    arms = report["arms"]
    figure = Figure(figsize=(1.5 + 1.4 * len(arms), 4), layout="constrained")
    axes = figure.subplots()
    for x, arm in enumerate(arms):
        scores = [run["metrics"].get("AP") for run in arm["runs"] if run["status"] == DONE]
        scores = [score for score in scores if score is not None]
        axes.plot([x] * len(scores), scores, "o", color=f"C{x}", alpha=0.6)
        if mean := arm["summary"]["AP"]:
            half = mean["half_width"] or 0.0
            axes.errorbar(x + 0.15, mean["mean"], half, color="black", capsize=4, marker="_")
    axes.set_xticks(range(len(arms)), [arm["name"].replace(" ", "\n") for arm in arms])
    axes.set(ylabel="box AP, %", title=f"{report['dataset']['name']}: runs, mean, 95 % interval")
    axes.grid(axis="y", alpha=0.3)
    return figure

"""What a comparison found: one JSON-able dict, its Markdown and its figure; failures included.

Few seeds are the rule, so the intervals are wide, and ought to be: with three seeds Student's
factor before the standard error is 4.3, with two it is 12.7.
"""

import json
import platform
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from importlib import metadata
from pathlib import Path
from statistics import fmean

import numpy as np
import scipy.stats
import torch
import yaml
from matplotlib.figure import Figure
from tabulate import tabulate

from benchmark.runner import BEFORE, DONE, LIGHTLY_SCRIPT, Comparison, Run
from jigsaw_d2 import __version__
from jigsaw_d2.config import flatten
from jigsaw_d2.cost import device_name
from jigsaw_d2.io import write_text
from jigsaw_d2.tools.pipeline import DetectionSet

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
PACKAGES = ("torch", "torchvision", "detectron2", "numpy", "opencv-python-headless", "pycocotools")
UNITS = {"seconds": (1.0, "device seconds"), "flops": (1e15, "backbone PFLOPs")}
OWN_SETTINGS = {"MODEL.WEIGHTS", "SEED", "OUTPUT_DIR"}  # what makes an arm and a run
FIGURE = "figures/ap_over_cost.png"


def write_report(comparison: Comparison, command: str) -> Path:
    """Write report.md, report.json and the figure into the comparison's folder."""
    path = comparison.output / "report.md"
    (comparison.output / FIGURE).parent.mkdir(parents=True, exist_ok=True)
    report = build_report(comparison, command)
    curve_figure(report).savefig(comparison.output / FIGURE, dpi=110)
    write_text(path.with_suffix(".json"), json.dumps(report, indent=1, allow_nan=False) + "\n")
    write_text(path, render(report))
    return path


def build_report(comparison: Comparison, command: str = "") -> dict:
    """The report of a comparison, finished or not.

    Paths below its output and the dataset's are written as OUTPUT and DATA, so that a report can be
    published, and its commands typed elsewhere.
    """
    plan, runs = comparison.plan, comparison.runs
    short = _shortener(comparison.data, comparison.output, plan.lightly_python)
    arms = []
    for arm in dict.fromkeys(run.arm for run in runs):
        summary = {name: interval(_values(runs, arm.name, name).values()) for name in METRICS}
        own = [_run(run, short, plan.cost) for run in runs if run.arm == arm]
        arms.append({"name": arm.name, "kind": arm.kind, "runs": own, "summary": summary})
    return {
        "version": 2,
        "command": short(command),
        "dataset": dataset_facts(comparison.data),
        **{name: value for name, value in vars(plan).items() if name != "arms"},
        "pretrain_config": short(plan.pretrain_config),
        "detector_config": short(plan.detector_config),
        "lightly_python": short(plan.lightly_python),
        "arms": arms,
        "differences": differences(runs),
        "detector_differences": setting_differences(comparison),
        "environment": environment(),
    }


def _shortener(data: DetectionSet, output: Path, lightly_python: str = "") -> Callable[[str], str]:
    """Replaces the paths of this machine: of two that begin alike, the longer one first."""
    root = data.train_json.parent
    names = [(str(root), "DATA"), (str(output), "OUTPUT")]
    names += [(str(LIGHTLY_SCRIPT), f"benchmark/{LIGHTLY_SCRIPT.name}")]
    names += [(lightly_python, "LIGHTLY_PYTHON")] if lightly_python else []
    if root not in data.train_images.parents:
        names.append((str(data.train_images), "IMAGES"))
    names.sort(key=lambda pair: -len(pair[0]))
    return lambda text: reduce(lambda short, pair: short.replace(*pair), names, text)


def _run(run: Run, short: Callable[[str], str], unit: str) -> dict:
    facts = {name: value for name, value in vars(run).items() if name not in ("arm", "index")}
    facts |= {"error": short(run.error), "commands": [*map(short, run.commands)]}
    return {**facts, "cost_curve": run.cost_curve(unit)}


def _values(runs: Sequence[Run], arm: str, metric: str) -> dict[int, float]:
    """{index of the seed: value} of an arm's finished runs for which the metric is defined."""
    done = [run for run in runs if run.arm.name == arm and run.status == DONE]
    return {run.index: run.metrics[metric] for run in done if run.metrics.get(metric) is not None}


def interval(values: Iterable[float]) -> dict | None:
    """Mean and half width of its 95 % interval by Student's t; None without values.

    Returns:
        {"mean", "half_width", "count", "covers_zero"}; a single value has no interval: two Nones.
    """
    values = [*values]
    if not values:
        return None
    mean, half = fmean(values), None
    if len(values) > 1:
        half = float(scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values))
    covers = None if half is None else abs(mean) <= half
    return {"mean": mean, "half_width": half, "count": len(values), "covers_zero": covers}


def differences(runs: Sequence[Run]) -> list[dict]:
    """Paired differences of AP and AP50 over the seeds that both arms of a pair have finished.

    Arms from scratch are subtracted from the others, and all others from Jigsaw's, so that a
    positive number speaks for pre-training, and for ours; the A/A copy has scratch subtracted.
    """
    arms = list(dict.fromkeys(run.arm for run in runs))
    arms.sort(key=lambda arm: (arm.kind == "jigsaw", arm.kind != "scratch", arm.seed_offset))
    found = []
    for number, theirs in enumerate(arms):
        for ours in arms[number + 1 :]:
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
            values, folder = yaml.safe_load(path.read_text()), str(comparison.folder(run))
            pairs = flatten(values)
            settings[run.arm.name] = {k: str(v).replace(folder, "RUN") for k, v in pairs}
    keys = {key for tree in settings.values() for key in tree} - OWN_SETTINGS
    found = {k: {arm: str(tree.get(k)) for arm, tree in settings.items()} for k in sorted(keys)}
    return {key: values for key, values in found.items() if len(set(values.values())) > 1}


def environment() -> dict[str, str]:
    """Versions and hardware, without names of machines or people."""
    installed = {dist.metadata["Name"]: dist.version for dist in metadata.distributions()}
    return {
        "jigsaw_d2": __version__,
        "python": platform.python_version(),
        **{name: installed.get(name, "not a distribution") for name in PACKAGES},
        "device": device_name("cuda" if torch.cuda.is_available() else "cpu"),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def dataset_facts(data: DetectionSet) -> dict:
    """Name, counts and categories of a dataset."""
    facts: dict = {"name": data.name}
    for split, path in (("train", data.train_json), ("val", data.val_json)):
        document = json.loads(path.read_bytes())
        facts[split] = {key: len(document[key]) for key in ("images", "annotations")}
        facts["categories"] = [entry["name"] for entry in document["categories"]]
    return facts


def render(report: dict) -> str:
    """Markdown of ``build_report``'s dict, to lie beside the figure."""
    data = report["dataset"]
    unfinished = sum(run["status"] != DONE for arm in report["arms"] for run in arm["runs"])
    counts = ", ".join(
        f"{split} {data[split]['images']} images, {data[split]['annotations']} annotations"
        for split in ("train", "val")
    )
    state = f"**{unfinished} run(s) failed or did not run yet; see below.**" if unfinished else ""
    commands = [
        f"{arm['name']}, seed {run['seed']}:\n\n```\n" + "\n".join(run["commands"]) + "\n```"
        for arm in report["arms"]
        if (run := arm["runs"][0])["commands"]
    ]
    parts = [
        f"# Comparison on {data['name']}, preset {report['preset']}",
        f"{data['name']}: {counts}, {len(data['categories'])} classes. Seeds "
        f"{', '.join(map(str, report['seeds']))}. Budget: {budget_text(report)}. Every arm's "
        f"detector: `{report['detector_config']}` {_with(report['detector'])}; "
        f"pre-training: `{report['pretrain_config']}` {_with(report['pretrain'])}.",
        f"Made by `{report['command']}`",
        norm_text(report),
        state,
        "## Box AP on the held-out images",
        _results(report),
        "Mean over seeds ± half width of the 95 % interval (Student's t). "
        "\\- : not defined, such as APl without large objects, or no finished run.",
        "## Paired differences",
        _differences(report),
        _settings(report),
        "## Every run",
        _runs(report),
        "## Cost",
        _costs(report),
        "Device seconds without start-up and evaluation, mean over finished runs.",
        f"![AP over cost]({FIGURE})",
        "## Commands",
        *commands,
        "## Versions and hardware",
        _table(["what", "which"], report["environment"].items()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def norm_text(report: dict) -> str:
    """Which of the two was done with the arms' norms."""
    if report["same_norm"]:
        return "Norms: the same for every arm, that of random weights, and no stage is frozen."
    return (
        "Norms: each arm at its best. The detector's config says one for backbones "
        "from weights and one for random ones; where a whole detector goes on, its norm stays."
    )


def budget_text(report: dict) -> str:
    """The rule that set the lengths, as far as the runs that finished bear it out."""
    also, units = "", f"counted in {report['cost']} of the cost logs"
    if {"direct", "lightly"} & {arm["kind"] for arm in report["arms"]}:
        also = "; direct and lightly pre-train for as much as the Jigsaw run of their seed cost"
    if report["budget"] == "detection":
        rule = "equal detection cost, as in Table 3: all arms have the same detection iterations"
        return rule + (f"{also} before, {units}" if also else "")
    jigsaw = [run for arm in report["arms"] if arm["kind"] == "jigsaw" for run in arm["runs"]]
    if not jigsaw:
        return "no arm pre-trains here, so all have the same detection iterations"
    if all(run["status"] != DONE for run in jigsaw):
        return "none yet: no Jigsaw run has finished, so nothing here is at equal total cost"
    return (
        "equal total cost, as in Table 5: a run from scratch trains for as much as the Jigsaw run "
        f"of its seed cost in all{also}, {units}"
    )


def verdict(found: dict | None) -> str:
    """One phrase on whether a difference is told apart from chance."""
    if found is None:
        return "no common seeds finished"
    if found["half_width"] is None:
        return "one seed: no interval"
    if found["covers_zero"]:
        return "interval covers zero: not told apart from chance"
    return "above zero" if found["mean"] > 0 else "below zero"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    return tabulate(rows, head, tablefmt="pipe", disable_numparse=True)


def _with(overrides: list[str]) -> str:
    return f"with `{' '.join(overrides)}`" if overrides else "as it is"


def _mean(found: dict | None) -> str:
    if found is None:
        return "-"
    half = "(one seed)" if found["half_width"] is None else f"± {found['half_width']:.2f}"
    return f"{found['mean']:.2f} {half}"


def _results(report: dict) -> str:
    rows = []
    for arm in report["arms"]:
        done = sum(run["status"] == DONE for run in arm["runs"])
        cells = [_mean(arm["summary"][metric]) for metric in METRICS]
        rows.append([arm["name"], f"{done} of {len(arm['runs'])}", *cells])
    return _table(["arm", "seeds", *METRICS], rows)


def _differences(report: dict) -> str:
    rows = [
        [f"{d['ours']} − {d['theirs']}", _mean(d["AP"]), _mean(d["AP50"]), verdict(d["AP"])]
        for d in report["differences"]
    ]
    if not rows:
        return "A single arm has nothing to differ from."
    text = _table(["difference", "AP", "AP50", "verdict on AP"], rows)
    if any(arm["name"] == "scratch again" for arm in report["arms"]):
        text += (
            '\n\n"scratch again − scratch" is the A/A test: the same arm twice with other seeds. '
            "What it shows is chance alone, and no smaller difference means anything."
        )
    return text


def _settings(report: dict) -> str:
    found, names = report["detector_differences"], [arm["name"] for arm in report["arms"]]
    if not found:
        return "The finished arms' detector configs are identical but for weights, seed and folder."
    rows = [[f"`{key}`", *(values.get(n, "-") for n in names)] for key, values in found.items()]
    text = "The arms' saved detector configs differ, beside weights, seed and folder, in:\n\n"
    return text + _table(["detector setting", *names], rows)


def _runs(report: dict) -> str:
    rows = []
    for arm in report["arms"]:
        for run in arm["runs"]:
            status = run["status"] + (f": {run['error']}" if run["error"] else "")
            lengths = [run["iterations"].get(key, "-") for key in ("pretraining", "detection")]
            scores = [run["metrics"].get(key) for key in ("AP", "AP50")]
            scores = ["-" if score is None else f"{score:.2f}" for score in scores]
            rows.append([arm["name"], run["seed"], status.replace("|", "/"), *lengths, *scores])
    lengths = ("pre-training iterations", "detection iterations")
    return _table(["arm", "seed", "status", *lengths, "AP", "AP50"], rows)


def _costs(report: dict) -> str:
    stages, rows = (*BEFORE, "finetuning"), []
    for arm in report["arms"]:
        done = [run["costs"] for run in arm["runs"] if run["status"] == DONE]
        seconds, flops = (
            [fmean(costs.get(s, {}).get(unit, 0.0) for costs in done or [{}]) for s in stages]
            for unit in UNITS
        )
        cells = [f"{s:.0f} s" if s else "-" for s in (*seconds, sum(seconds))]
        rows.append([arm["name"], *cells, f"{sum(flops) / 1e15:.3f}" if done else "-"])
    return _table(["arm", *stages, "total", "backbone PFLOPs"], rows)


def curve_figure(report: dict) -> Figure:
    """AP over total cost, mean and range over an arm's finished seeds; Jigsaw's begin later."""
    scale, label = UNITS[report["cost"]]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for arm in report["arms"]:
        curves = [run["cost_curve"] for run in arm["runs"] if run["cost_curve"]]
        if curves:  # one that found nothing at first has no AP there, and so fewer points
            points = np.array([curve[-min(map(len, curves)) :] for curve in curves])
            costs, scores = points[..., 0].mean(0) / scale, points[..., 1]
            (line,) = axes.plot(costs, scores.mean(0), "o-", markersize=4, label=arm["name"])
            band = scores.min(0), scores.max(0)
            axes.fill_between(costs, *band, color=line.get_color(), alpha=0.2)
    axes.set(xlabel=f"total cost, {label}", ylabel="box AP, %", title=report["dataset"]["name"])
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    return figure

"""Everything a comparison found, as one JSON-able dict: nothing is left out, no failure either."""

import json
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch
import yaml

from jigsaw_d2 import __version__
from jigsaw_d2.comparison.plan import Plan
from jigsaw_d2.comparison.runner import DONE, Comparison, Run
from jigsaw_d2.comparison.statistics import Interval, mean_interval, paired_difference
from jigsaw_d2.cost import device_name
from jigsaw_d2.jobs.pipeline import DetectionSet

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
PACKAGES = ("torch", "torchvision", "detectron2", "numpy", "opencv-python-headless", "pycocotools")


def build_report(
    plan: Plan, data: DetectionSet, runs: Sequence[Run], output: Path, command: str = ""
) -> dict:
    """The report of a plan's runs, finished or not.

    Paths below ``output`` and the dataset's are written as OUTPUT and DATA, so that a report can be
    published, and its commands typed elsewhere.
    """
    short = _Shortener(data, output)
    arms = [
        _arm(name, [run for run in runs if run.arm.name == name], short) for name in _names(runs)
    ]
    return {
        "version": 1,
        "preset": plan.preset,
        "about": plan.about,
        "command": short(command),
        "dataset": dataset_facts(data),
        "budget": plan.budget,
        "cost_unit": plan.cost,
        "seeds": list(plan.seeds),
        "pretrain_config": short(plan.pretrain_config),
        "detector_config": short(plan.detector_config),
        "pretrain_overrides": list(plan.pretrain),
        "detector_overrides": list(plan.detector),
        "arms": arms,
        "differences": differences(runs),
        "environment": environment(),
    }


def _names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(run.arm.name for run in runs))


def _arm(name: str, runs: list[Run], short: "_Shortener") -> dict:
    return {
        "name": name,
        "kind": runs[0].arm.kind,
        "runs": [_run(run, short) for run in runs],
        "summary": {metric: summary(runs, metric) for metric in METRICS},
    }


def _run(run: Run, short: "_Shortener") -> dict:
    return {
        "seed": run.seed,
        "status": run.status,
        "error": short(run.error),
        "metrics": run.metrics,
        "curve": run.curve,
        "iterations": run.iterations,
        "costs": run.costs,
        "commands": [short(command) for command in run.commands],
    }


def summary(runs: Sequence[Run], metric: str) -> dict | None:
    """Mean and 95 % half width of one metric over an arm's finished runs; None without any."""
    values = [value for value in _values(runs, metric).values()]
    return _interval(mean_interval(values)) if values else None


def _values(runs: Sequence[Run], metric: str) -> dict[int, float]:
    """{index of the seed: value} of the finished runs for which the metric is defined."""
    values = {run.index: run.metrics.get(metric) for run in runs if run.status == DONE}
    return {index: value for index, value in values.items() if value is not None}


def _interval(interval: Interval | None) -> dict | None:
    if interval is None:
        return None
    return {
        "mean": interval.mean,
        "half_width": interval.half_width,
        "count": interval.count,
        "covers_zero": interval.covers_zero,
    }


def differences(runs: Sequence[Run]) -> list[dict]:
    """Each pair of arms that share seeds: paired differences of AP and AP50, later minus earlier.

    Baselines from scratch count as earlier, so that a positive number speaks for pre-training.
    """
    names = sorted(_names(runs), key=lambda name: _rank(name, runs))
    found = []
    for i, theirs in enumerate(names):
        for ours in names[i + 1 :]:
            pair = [[run for run in runs if run.arm.name == name] for name in (ours, theirs)]
            entry: dict = {"ours": ours, "theirs": theirs}
            for metric in ("AP", "AP50"):
                values = [_values(of_arm, metric) for of_arm in pair]
                entry[metric] = _interval(paired_difference(*values))
            found.append(entry)
    return found


def _rank(name: str, runs: Sequence[Run]) -> int:
    """Scratch first, then its A/A copy, then the others in the plan's order."""
    arm = next(run.arm for run in runs if run.arm.name == name)
    if arm.kind == "scratch":
        return -2 if arm.seed_offset == 0 else -1
    return _names(runs).index(name)


def environment() -> dict[str, str]:
    """Versions and hardware, without names of machines or people."""
    facts = {"jigsaw_d2": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "not installed as a distribution"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        **facts,
        "device": device_name(device),
        "platform": f"{sys.platform} {platform.machine()}",
    }


def dataset_facts(data: DetectionSet) -> dict:
    """Name and counts of a dataset."""
    facts: dict = {"name": data.name}
    for split, path in (("train", data.train_json), ("val", data.val_json)):
        document = json.loads(path.read_text())
        facts[split] = {
            "images": len(document["images"]),
            "annotations": len(document["annotations"]),
        }
        facts["categories"] = [entry["name"] for entry in document["categories"]]
    return facts


def collect_configs(comparison: Comparison, folder: Path) -> list[str]:
    """Copy the config of each training of each arm's first finished run into ``folder``/configs.

    Returns:
        Their paths relative to ``folder``.
    """
    short = _Shortener(comparison.data, comparison.output)
    names: list[str] = []
    for arm in comparison.plan.arms:
        runs = [run for run in comparison.runs if run.arm is arm and run.status == DONE]
        for part in ("pretrain", "detector") if runs else ():
            source = comparison.folder(runs[0]) / part / "config.yaml"
            if source.is_file():
                names.append(f"configs/{arm.slug}-{part}.yaml")
                (folder / "configs").mkdir(exist_ok=True)
                (folder / names[-1]).write_text(short(source.read_text()))
    return names


def setting_differences(comparison: Comparison) -> dict[str, dict[str, str]]:
    """Key -> {arm: value} of every detector setting in which the arms' configs differ.

    Weights, seed and folder are left out: they are what makes an arm and a run.
    """
    settings = {}
    for run in comparison.runs:
        path = comparison.folder(run) / "detector" / "config.yaml"
        if run.status == DONE and run.arm.name not in settings:
            settings[run.arm.name] = _flat(yaml.safe_load(path.read_text()))
    keys = sorted({key for flat in settings.values() for key in flat})
    found = {key: {arm: str(flat.get(key)) for arm, flat in settings.items()} for key in keys}
    own = ("MODEL.WEIGHTS", "SEED", "OUTPUT_DIR")
    return {k: v for k, v in found.items() if k not in own and len(set(v.values())) > 1}


def _flat(tree: dict, prefix: str = "") -> dict[str, object]:
    """{"A": {"B": 1}} -> {"A.B": 1}."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        inner = (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
        flat.update(inner)
    return flat


class _Shortener:
    """Replaces the paths of this machine by OUTPUT and DATA."""

    def __init__(self, data: DetectionSet, output: Path) -> None:
        root = Path(data.train_json).parent
        pairs = [(str(Path(output).resolve()), "OUTPUT"), (str(root), "DATA")]
        if data.train_images.parent != root:
            pairs.append((str(data.train_images), "IMAGES"))
        self._pairs = sorted(pairs, key=lambda pair: -len(pair[0]))

    def __call__(self, text: str) -> str:
        for path, name in self._pairs:
            text = text.replace(path, name)
        return text

"""A comparison's report as Markdown: tables first, then what they cost, then how to repeat them."""

from collections.abc import Sequence

from jigsaw_d2.comparison.runner import DONE

HEADER_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
BUDGET_TEXT = {
    "total": "equal total cost, as in Table 5: from scratch trains longer by pre-training's cost",
    "detection": "equal detection cost, as in Table 3: all arms have the same detection iterations",
}


def render(report: dict, figures: Sequence[str] = ()) -> str:
    """Markdown text of ``report.build_report``'s dict; ``figures`` are paths relative to it."""
    parts = [
        _head(report),
        "## Box AP on the held-out images\n\n" + results_table(report),
        "## Paired differences\n\n" + differences_table(report),
        settings_text(report),
        "## Every run\n\n" + runs_table(report),
        "## Cost\n\n" + cost_table(report),
        "".join(f"![{name}]({name})\n\n" for name in figures).rstrip(),
        "## Commands and configs\n\n" + _commands(report),
        "## Versions and hardware\n\n" + _facts(report["environment"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(report: dict) -> str:
    data = report["dataset"]
    counts = ", ".join(
        f"{split} {data[split]['images']} images, {data[split]['annotations']} annotations"
        for split in ("train", "val")
    )
    failed = sum(run["status"] != DONE for arm in report["arms"] for run in arm["runs"])
    state = f"\n\n**{failed} run(s) failed or did not run yet; see below.**" if failed else ""
    return (
        f"# Comparison on {data['name']}, preset {report['preset']}\n\n"
        f"{data['name']}: {counts}, {len(data['categories'])} classes. Seeds "
        f"{', '.join(map(str, report['seeds']))}. Budget: {BUDGET_TEXT[report['budget']]}, counted "
        f"in {report['cost_unit']} of the ledger. Every arm's detector: "
        f"`{report['detector_config']}` {_inline(report['detector_overrides'])}; pre-training: "
        f"`{report['pretrain_config']}` {_inline(report['pretrain_overrides'])}.\n\n"
        f"Made by `{report['command']}`{state}"
    )


def _inline(overrides: list[str]) -> str:
    return f"with `{' '.join(overrides)}`" if overrides else "as it is"


def results_table(report: dict) -> str:
    """Mean and 95 % interval over seeds of each metric, one row an arm."""
    rows = [["arm", "seeds", *HEADER_METRICS]]
    for arm in report["arms"]:
        done = sum(run["status"] == DONE for run in arm["runs"])
        cells = [_mean(arm["summary"][metric]) for metric in HEADER_METRICS]
        rows.append([arm["name"], f"{done} of {len(arm['runs'])}", *cells])
    return table(rows) + (
        "\n\nMean over seeds ± half width of the 95 % interval (Student's t). "
        "\\- : not defined, such as APl without large objects, or no finished run."
    )


def _mean(interval: dict | None) -> str:
    if interval is None:
        return "-"
    if interval["half_width"] is None:
        return f"{interval['mean']:.2f} (one seed)"
    return f"{interval['mean']:.2f} ± {interval['half_width']:.2f}"


def differences_table(report: dict) -> str:
    """Paired differences over seeds, and whether zero lies within the interval."""
    rows = [["difference", "AP", "AP50", "verdict on AP"]]
    for entry in report["differences"]:
        name = f"{entry['ours']} − {entry['theirs']}"
        rows.append([name, _mean(entry["AP"]), _mean(entry["AP50"]), verdict(entry["AP"])])
    text = table(rows) if len(rows) > 1 else "A single arm has nothing to differ from."
    if any(arm["name"] == "scratch again" for arm in report["arms"]):
        text += (
            '\n\n"scratch again − scratch" is the A/A test: the same arm twice with other seeds. '
            "What it shows is chance alone, and no smaller difference means anything."
        )
    return text


def settings_text(report: dict) -> str:
    """In which settings the arms' detectors differ, found by comparing their saved configs."""
    found = report.get("detector_differences")
    if found is None:
        return ""
    if not found:
        return "The arms' saved detector configs are identical but for weights, seed and folder."
    rows = [["detector setting", *(arm["name"] for arm in report["arms"])]]
    for key, values in found.items():
        rows.append([f"`{key}`", *(values.get(arm["name"], "-") for arm in report["arms"])])
    return (
        "The arms' saved detector configs differ, beside weights, seed and folder, in:\n\n"
        + table(rows)
    )


def verdict(interval: dict | None) -> str:
    """One phrase on whether a difference is told apart from chance."""
    if interval is None:
        return "no common seeds finished"
    if interval["half_width"] is None:
        return "one seed: no interval"
    if interval["covers_zero"]:
        return "interval covers zero: not told apart from chance"
    return "above zero" if interval["mean"] > 0 else "below zero"


def runs_table(report: dict) -> str:
    """One row a run, the failed ones with their reason."""
    rows = [
        ["arm", "seed", "status", "pre-training iterations", "detection iterations", "AP", "AP50"]
    ]
    for arm in report["arms"]:
        for run in arm["runs"]:
            status = run["status"] + (f": {run['error']}" if run["error"] else "")
            lengths = [str(run["iterations"].get(key, "-")) for key in ("pretraining", "detection")]
            scores = [_number(run["metrics"].get(key)) for key in ("AP", "AP50")]
            rows.append(
                [arm["name"], str(run["seed"]), status.replace("|", "/"), *lengths, *scores]
            )
    return table(rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def cost_table(report: dict) -> str:
    """The ledger, mean over the finished runs of each arm."""
    stages = ("extraction", "pretraining", "erf_refresh", "finetuning")
    rows = [["arm", *stages, "total", "backbone PFLOPs"]]
    for arm in report["arms"]:
        done = [run for run in arm["runs"] if run["status"] == DONE]
        if not done:
            rows.append([arm["name"], *["-"] * (len(stages) + 2)])
            continue
        mean = [_mean_cost(done, stage, "seconds") for stage in stages]
        flops = sum(_mean_cost(done, stage, "flops") for stage in stages)
        seconds = [f"{value:.0f} s" if value else "-" for value in [*mean, sum(mean)]]
        rows.append([arm["name"], *seconds, f"{flops / 1e15:.3f}"])
    return (
        table(rows) + "\n\nDevice seconds without start-up and evaluation, mean over finished runs."
    )


def _mean_cost(runs: list[dict], stage: str, unit: str) -> float:
    return sum(run["costs"].get(stage, {}).get(unit, 0.0) for run in runs) / len(runs)


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _commands(report: dict) -> str:
    blocks = []
    for arm in report["arms"]:
        commands = arm["runs"][0]["commands"]
        if commands:
            blocks.append(
                f"{arm['name']}, seed {arm['runs'][0]['seed']}:\n\n```\n"
                + "\n".join(commands)
                + "\n```"
            )
    listed = ", ".join(f"[{name}]({name})" for name in report.get("configs", []))
    return "\n\n".join([*blocks, *([f"Whole configs: {listed}."] if listed else [])])


def _facts(facts: dict[str, str]) -> str:
    return table([["what", "which"], *([key, str(value)] for key, value in facts.items())])

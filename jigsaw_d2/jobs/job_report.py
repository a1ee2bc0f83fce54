"""What a job did and found, as Markdown: one table of stages, one of metrics, the commands."""

from jigsaw_d2.comparison.report_markdown import table
from jigsaw_d2.jobs.job import Job, JobResult

SHOWN = ("AP", "AP50", "AP75")
NAMES = {"jigsaw": "Jigsaw pre-training", "scratch": "scratch"}


def result_tables(result: JobResult) -> str:
    """Stage, seconds, images; then AP and AP50 of each detector."""
    rows = [["stage", "seconds", "images"]]
    for report, images in result.stages:
        rows.append([report.title, f"{report.seconds:.0f}", str(images) if images else "-"])
    rows.append(["total", f"{result.seconds:.0f}", ""])
    scores = [["detector from", *SHOWN]]
    for name, metrics in result.metrics.items():
        scores.append([NAMES.get(name, name), *(_number(metrics.get(key)) for key in SHOWN)])
    return f"{aligned(rows)}\n\n{aligned(scores)}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def aligned(rows: list[list[str]]) -> str:
    """A Markdown table whose columns line up on a terminal too."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = [
        [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ]
        for row in rows
    ]
    return table(padded)


def job_report(job: Job, result: JobResult, figures: list[str]) -> str:
    """The whole report; ``figures`` are paths relative to it."""
    lengths = f"\n\nLengths: {result.explanation}." if result.explanation else ""
    commands = "\n".join(report.command for report, _ in result.stages)
    drawn = "\n\n".join(f"![{name}]({name})" for name in figures)
    return (
        f"# {job.data.name}: from annotations to a detector\n\n{result_tables(result)}{lengths}\n\n"
        "Both detectors, if there are two, have the same settings, seed and number of iterations; "
        "the one from scratch did without the pre-training's seconds. One seed: chance is in these "
        "numbers, and `compare` is what measures it.\n\n"
        f"## Commands\n\n```\n{commands}\n```\n\n{drawn}".rstrip() + "\n"
    )

"""The extraction report as one figure: classes, groups, sizes, fill of the template."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jigsaw_d2.data.samples import GROUPS
from jigsaw_d2.data.template import REGION_GROUPS, REGIONS

GROUP_COLORS = {"S": "#4477aa", "T": "#228833", "W": "#ee6677"}
MAX_CLASSES = 40


def report_figure(report: dict) -> Figure:
    """Four panels of a report of ``data.report.summarise``."""
    figure = Figure(figsize=(13, 9), layout="constrained")
    panels = figure.subplot_mosaic(
        [["classes", "classes"], ["groups", "fill"], ["sizes", "sizes"]],
        height_ratios=[3, 3, 2.4],
    )
    _draw_classes(panels["classes"], report)
    _draw_groups(panels["groups"], report)
    _draw_fill(panels["fill"], report)
    _draw_sizes(panels["sizes"], report)
    figure.suptitle(
        f"{report['samples']} samples: {report['positives']} positive, "
        f"{report['negatives']} negative"
    )
    return figure


def _draw_classes(axes: Axes, report: dict) -> None:
    rows = sorted(report["classes"][:-1], key=lambda row: -sum(row[1:]))
    shown = rows[: MAX_CLASSES - 1] + report["classes"][-1:]
    counts = np.array([row[1:] for row in shown])
    bottom = np.zeros(len(shown))
    for group, values in zip(GROUPS, counts.T):
        axes.bar(range(len(shown)), values, bottom=bottom, color=GROUP_COLORS[group], label=group)
        bottom += values
    axes.set_xticks(
        range(len(shown)), [row[0] for row in shown], rotation=60, ha="right", fontsize=8
    )
    axes.set_yscale("symlog", linthresh=10)
    axes.set_ylabel("samples (log above 10)")
    axes.legend(title="group")
    left_out = len(rows) - len(shown) + 1
    axes.set_title(
        "per class and group" + (f", {left_out} smaller classes left out" * (left_out > 0))
    )


def _draw_groups(axes: Axes, report: dict) -> None:
    positives, negatives = (
        [report["groups"][g][kind] for g in GROUPS] for kind in ("positive", "negative")
    )
    axes.bar(GROUPS, positives, color=[GROUP_COLORS[g] for g in GROUPS], label="positive")
    axes.bar(GROUPS, negatives, bottom=positives, color="#bbbbbb", label="negative")
    for x, (positive, negative) in enumerate(zip(positives, negatives)):
        axes.text(x, positive + negative, f"{positive} + {negative}", ha="center", va="bottom")
    axes.margins(y=0.12)
    axes.set_title("per group, positive + negative (grey)")


def _draw_fill(axes: Axes, report: dict) -> None:
    for y, (region, group) in enumerate(zip(REGIONS, REGION_GROUPS)):
        fill = report["template"]["regions"][region]
        if fill is None:
            axes.text(0.02, y, "no sample of its own: borrows", va="center")
            continue
        axes.barh(y, fill["used"], color=GROUP_COLORS[group])
        axes.barh(y, fill["padded"], left=fill["used"], color="#dddddd")
        text = f"{fill['used']:.0%} used; {fill['cropped']:.0%} of a sample cropped away"
        axes.text(0.02, y, text, va="center", fontsize=9)
    axes.set_yticks(range(4), [f"{r} ({g})" for r, g in zip(REGIONS, REGION_GROUPS)])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of the region's pixels: used, padded (grey)")
    axes.set_title("expected fill of the template")


def _draw_sizes(axes: Axes, report: dict) -> None:
    """5 to 95 % of the samples' sides as bars, the median as a dot."""
    labels, y = [], 0
    for group in GROUPS:
        for side, values in report["groups"][group]["size_percentiles"].items():
            axes.plot(values[::2], [y, y], color=GROUP_COLORS[group], linewidth=6, alpha=0.4)
            axes.plot(values[1], y, "o", color=GROUP_COLORS[group])
            labels.append(f"{group} {side}")
            y += 1
    (height, width), (y0, x0) = report["template"]["size"], report["template"]["split"]
    for size in {y0, x0, height - y0, width - x0}:
        axes.axvline(size, color="#999999", linestyle=":")
    axes.set_yticks(range(y), labels)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("pixels; dotted: sides of the regions")
    axes.set_title("sample sizes: 5 %, median, 95 %")

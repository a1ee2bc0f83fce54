"""A run's ledger in words, beside what ImageNet pre-training costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jigsaw_d2.cost import LEDGER_NAME, STAGES, TRAIN_FORWARDS, LedgerError, read_ledger

# R50 with stride in its 3x3 convolutions, classifier of 1,000 classes included, per 224x224 image.
R50_MACS = 4_089_184_256
IMAGENET_IMAGES = 1_281_167


@dataclass(frozen=True)
class Reference:
    """A known pre-training, as images of 224x224 pixels that a ResNet-50 was trained on."""

    name: str
    images: float

    @property
    def pixels(self) -> float:
        """Of all images."""
        return self.images * 224 * 224

    @property
    def flops(self) -> float:
        """Of a ResNet-50 on these images, forward and backward, two per multiply-accumulate."""
        return 2 * R50_MACS * TRAIN_FORWARDS * self.images


REFERENCES = (
    Reference("Jigsaw, the paper's 64k x 512", 64_000 * 512),
    Reference("ImageNet, 90 epochs", 90 * IMAGENET_IMAGES),
    Reference("ImageNet, 100 epochs", 100 * IMAGENET_IMAGES),
    Reference("ImageNet, fast recipe to 73.8 %", 11.6e6),
    Reference("ImageNet, fast recipe to 76.6 %", 23.0e6),
)


def format_ledger(output_dirs: str | Path | Sequence[str | Path]) -> str:
    """Table of the stages of one or more folders, summed, and of the references.

    Raises:
        LedgerError: a folder without a ledger, or with a damaged one.
    """
    if isinstance(output_dirs, (str, Path)):
        output_dirs = [output_dirs]
    stages = sum_stages(output_dirs)
    rows = [["stage", "images", "Mpixels", "PFLOP", "device hours", "devices"]]
    for stage in (s for s in STAGES if s in stages):
        rows.append(_row(stage, stages[stage]))
    rows.append(_row("all", _total(stages.values())))
    text = [format_table(rows), "", *_comparison(stages)]
    return "\n".join(text)


def sum_stages(output_dirs: Sequence[str | Path]) -> dict[str, dict[str, Any]]:
    """Stages of several ledgers, added up.

    Raises:
        LedgerError: naming the folder that has none.
    """
    found: dict[str, list[dict]] = {}
    for folder in output_dirs:
        ledger = read_ledger(folder)
        if not ledger["stages"]:
            raise LedgerError(
                f"{folder} holds no {LEDGER_NAME}; name the folder of a store or of a run"
            )
        for stage, entry in ledger["stages"].items():
            found.setdefault(stage, []).append(entry)
    return {stage: _total(entries) for stage, entries in found.items()}


def _total(entries: Any) -> dict[str, Any]:
    entries = list(entries)
    total = {key: sum(e[key] for e in entries) for key in ("images", "pixels", "flops", "seconds")}
    total["devices"] = sorted({device for e in entries for device in e["devices"]})
    return total


def _row(name: str, entry: Mapping[str, Any]) -> list[str]:
    return [
        name,
        f"{entry['images']:,}",
        f"{entry['pixels'] / 1e6:,.1f}",
        f"{entry['flops'] / 1e15:,.4g}",
        f"{entry['seconds'] / 3600:,.3f}",
        "; ".join(entry["devices"]),
    ]


def _comparison(stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the references cost, and as multiples of this run's training and refreshes."""
    parts = [stages[s] for s in ("pretraining", "erf_refresh") if s in stages]
    if not parts:
        return []
    own = _total(parts)
    rows = [
        ["pre-training with R50 at 224x224", "images", "Mpixels", "PFLOP", "pixels/own", "FLOP/own"]
    ]
    for reference in REFERENCES:
        rows.append(
            [
                reference.name,
                f"{reference.images:,.0f}",
                f"{reference.pixels / 1e6:,.0f}",
                f"{reference.flops / 1e15:,.0f}",
                f"{reference.pixels / own['pixels']:,.4g}" if own["pixels"] else "-",
                f"{reference.flops / own['flops']:,.4g}" if own["flops"] else "-",
            ]
        )
    return [format_table(rows)]


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, numbers to the right; the first row is the head."""
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])

"""What extraction skipped and noticed, what a store holds, and how it suits the template."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from tabulate import tabulate

from jigsaw_d2.data.fit import detector_scale, fit_scale, fit_template, paper_fit, template_fill
from jigsaw_d2.data.samples import GROUPS
from jigsaw_d2.data.store_format import SUFFIXES
from jigsaw_d2.data.template import REGION_GROUPS, REGIONS, JigsawTemplate
from jigsaw_d2.io import DataError

FAULT, RULE, NOTE = "fault", "rule", "note"
EXAMPLES = 3

# reason -> (kind, what it says). A fault is skipped and ends the run under --strict; a rule is
# skipped by design; a note is kept.
REASONS = {
    "image_missing": (FAULT, "image file does not exist"),
    "image_unreadable": (FAULT, "image file cannot be opened"),
    "image_empty": (FAULT, "image file has zero bytes"),
    "image_not_an_image": (FAULT, "file is not an image"),
    "image_truncated": (FAULT, "image file is truncated or broken"),
    "image_16_bit": (
        FAULT,
        "more than 8 bits per channel, which Detectron2's reader saturates or darkens: scale to 8",
    ),
    "image_of_other_channels": (FAULT, "another number of channels than was asked for"),
    "image_of_other_form": (
        FAULT,
        "TIFF of more bands, or of other numbers, than Detectron2's reader (Pillow) takes",
    ),
    "image_too_large": (FAULT, "more pixels than the free memory holds; the file is whole"),
    "image_size_differs": (FAULT, "size differs from the json (after EXIF orientation)"),
    "image_id_repeated": (FAULT, "image id stands for another file already"),
    "image_listed_twice": (FAULT, "the same file again: its annotations join the first entry"),
    "category_id_repeated": (FAULT, "category id stands for another name already"),
    "annotation_of_unknown_image": (FAULT, "annotation names an image that is not in the json"),
    "annotation_of_unknown_category": (FAULT, "annotation names a category not in the json"),
    "annotation_repeated": (FAULT, "same image, category and box as another annotation"),
    "box_not_finite": (FAULT, "box holds NaN or infinity, or is not four numbers"),
    "box_without_area": (FAULT, "box has a zero or negative side"),
    "box_outside_image": (FAULT, "box lies outside the image"),
    "crowd": (RULE, 'crowd, or "ignore" is set: no positive, and no negative on it'),
    "box_too_small": (RULE, "annotated box below the minimal side"),
    "box_clipped": (NOTE, "box reached over the border and was clipped"),
    "json_encoding": (NOTE, "json in another encoding than plain UTF-8"),
    "number_is_text": (NOTE, "numbers given as text: read as numbers"),
    "id_of_other_kind": (NOTE, "an id is text here and a number there: taken as the same"),
    "image_id_is_text": (NOTE, "image id is text: a number stands for it in training and results"),
    "image_path_mended": (NOTE, "file name of another machine: read as the file that is there"),
    "image_size_missing": (NOTE, "no height and width in the json: the file's are taken"),
    "annotation_id_unusable": (NOTE, "annotation id missing, 0 or no number: numbered anew"),
    "annotation_ignored": (NOTE, '"ignore" is set: a crowd, in training and evaluation too'),
    "annotation_area_missing": (NOTE, '"area" missing or no number: width x height is taken'),
    "annotation_iscrowd_missing": (NOTE, '"iscrowd" missing: 0 is taken'),
    "segmentation_unusable": (NOTE, "outline of under 3 corners or no mask: its box stays alone"),
    "annotation_id_repeated": (NOTE, "annotation id used twice, for different objects: both kept"),
    "category_name_not_text": (NOTE, "category name is no text: read as text"),
    "category_name_repeated": (NOTE, "two categories of one name: the second gets a number"),
    "image_16_bit_colour": (NOTE, "16 bits per channel, of which the reader keeps the upper 8"),
    "image_bands_dropped": (NOTE, "more bands than red, green and blue: the others dropped"),
    "image_grey": (NOTE, "grey image, stored as grey JPEG"),
    "image_palette": (NOTE, "palette image, converted to RGB"),
    "image_cmyk": (NOTE, "CMYK image, converted to RGB"),
    "image_alpha": (NOTE, "alpha channel dropped"),
    "image_rotated": (NOTE, "turned upright by its EXIF orientation"),
    "image_without_positives": (NOTE, "no usable object on it: negatives only"),
    "image_without_room": (
        NOTE,
        "no free place for a negative of the sizes drawn; other images took it",
    ),
    "category_ids_with_gaps": (NOTE, "category ids are not consecutive: numbered in their order"),
    "category_without_samples": (NOTE, "category without a sample"),
}

GROUP_NAMES = {"S": "square-like (S)", "T": "tall (T)", "W": "wide (W)"}
# A sample shown this many times as often as one of the most numerous group is worth a warning.
STARVING_FACTOR = 10
# Below this share of a region's pixels the padding dominates what the network sees. COCO fills 43
# to 69 % of the template's regions, and an eighth to a third of a sample is cropped away.
LOW_FILL = 0.35
HIGH_CROP = 0.6
FEW_SAMPLES = 10


class ExtractionLog:
    """Counts of ``REASONS`` with up to three examples each; picklable, mergeable.

    Args:
        strict: raise DataError at the first fault.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self.counts: Counter[str] = Counter()
        self.examples: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, reason: str, where: str) -> None:
        """Count ``reason`` once; ``where`` names the file, image or annotation."""
        kind, text = REASONS[reason]
        if self.strict and kind == FAULT:
            raise DataError(f"{where}: {text} ({reason}; stopped because of --strict)")
        self._count(reason, 1, [where])

    def merge(self, entries: dict) -> None:
        """Add what the ``to_dict`` of another log gives behind what is here."""
        for reason, entry in entries.items():
            self._count(reason, entry["count"], entry["examples"])

    def _count(self, reason: str, count: int, examples: list[str]) -> None:
        self.counts[reason] += count
        self.examples[reason] = (self.examples[reason] + examples)[:EXAMPLES]

    def to_dict(self) -> dict:
        """{reason: {"count", "kind", "text", "examples"}} in the order of ``REASONS``."""
        return {
            reason: dict(count=count, kind=kind, text=text, examples=list(self.examples[reason]))
            for reason, (kind, text) in REASONS.items()
            if (count := self.counts[reason])
        }

    def tables(self) -> list[str]:
        """What was skipped and what was noticed, for the screen; nothing of what is empty."""
        parts = []
        for title, kinds in (("skipped", (FAULT, RULE)), ("noticed", (NOTE,))):
            rows = [
                [entry["count"], reason, entry["text"], entry["examples"][0]]
                for reason, entry in self.to_dict().items()
                if entry["kind"] in kinds
            ]
            if rows:
                parts.append(tabulate(rows, [title, "reason", "meaning", "for example"]))
        return parts

    def summary(self, *kinds: str) -> str:
        """What was counted of these kinds (all by default), in a line."""
        return "; ".join(
            f"{entry['count']} x {reason} ({entry['text']}), for example {entry['examples'][0]}"
            for reason, entry in self.to_dict().items()
            if not kinds or entry["kind"] in kinds
        )


def summarise(
    index: np.ndarray, categories: list[str], template: JigsawTemplate, scale_range: Sequence[float]
) -> dict:
    """Counts per class and group, sizes, fill of the template, cautions; plain Python values.

    Args:
        index: ``store_format.RECORD`` of shape (n,).
        categories: without background.
        scale_range: ratios that samples will be resized by.
    """
    counts = np.zeros((len(categories) + 1, 3), np.int64)
    np.add.at(counts, (index["class"], index["group"]), 1)
    groups, encoded = {}, {}
    for g, name in enumerate(GROUPS):
        sizes = index["size"][index["group"] == g]
        percentiles = np.percentile(sizes, [5, 50, 95], axis=0).round(1).T if len(sizes) else []
        groups[name] = {
            "positive": int(counts[:-1, g].sum()),
            "negative": int(counts[-1, g]),
            "size_percentiles": {k: v.tolist() for k, v in zip(("height", "width"), percentiles)},
        }
    for code in np.unique(index["format"]):
        encoded[SUFFIXES[code]] = int(index["length"][index["format"] == code].sum())
    names = [*categories, "background"]
    report = {
        "samples": len(index),
        "positives": int(counts[:-1].sum()),
        "negatives": int(counts[-1].sum()),
        "encoded_bytes": encoded,
        "groups": groups,
        "classes": [[name, *row] for name, row in zip(names, counts.tolist())],
        "template": {
            "size": [template.height, template.width],
            "split": [template.split_y, template.split_x],
            "scale_range": list(scale_range),
            "regions": template_fill(index["size"], index["group"], template, scale_range),
        },
    }
    return {**report, "cautions": cautions(report)}


def advise_fit(
    sizes: np.ndarray, groups: np.ndarray, sides: Sequence[float], detector_size: Sequence[float]
) -> dict:
    """What INPUT.JIGSAW.FIT_TO auto would choose for a detector, beside the paper's choice.

    Args:
        sizes, groups: (n, 2) and (n,) of the samples, see ``data.fit.expected_pixels``.
        sides: shorter and longer side of the usual image, pixels.
        detector_size: its MIN_SIZE_TRAIN and MAX_SIZE_TRAIN.
    """
    scale = detector_scale(sides, *detector_size)
    fit = fit_template(sizes, groups, fit_scale(scale), max_side=int(max(sides) * scale))
    names = {"detector_size": list(detector_size), "detector_scale": round(scale, 3)}
    return {**names, "auto": str(fit), "paper": str(paper_fit(sizes, groups))}


def cautions(report: dict) -> list[str]:
    """Sentences that say where the data do not suit the template, and what will be done."""
    sentences = []
    counts = {g: values["positive"] + values["negative"] for g, values in report["groups"].items()}
    # Two of the four regions show an S sample.
    rates = {g: (2 if g == "S" else 1) / count for g, count in counts.items() if count}
    for group, count in counts.items():
        if count == 0:
            regions = " and ".join(r for r, g in zip(REGIONS, REGION_GROUPS) if g == group)
            sentences.append(
                f"No {GROUP_NAMES[group]} sample: {regions} will borrow the samples of nearest "
                "aspect ratio."
            )
        elif (often := rates[group] / min(rates.values())) > STARVING_FACTOR:
            sentences.append(
                f"Only {count} {GROUP_NAMES[group]} samples: each will be shown {often:.0f} times "
                "as often as one of the most numerous group; they may be learnt by heart."
            )
    for group, (region, fill) in zip(REGION_GROUPS, report["template"]["regions"].items()):
        if fill is None:
            continue
        sides = report["groups"][group]["size_percentiles"]
        median = f"median {sides['width'][1]:.0f} x {sides['height'][1]:.0f} pixels"
        if fill["used"] < LOW_FILL:
            sentences.append(
                f"{region} will be {fill['padded']:.0%} zero padding: {GROUP_NAMES[group]} samples "
                f"({median}) are far smaller than it. A smaller INPUT.JIGSAW.TEMPLATE_SIZE would "
                "waste less."
            )
        if fill["cropped"] > HIGH_CROP:
            sentences.append(
                f"{region} will show random crops: on average {fill['cropped']:.0%} of "
                f"{GROUP_NAMES[group]} samples ({median}) does not fit. A lower "
                "INPUT.JIGSAW.SCALE_RANGE would show more of each."
            )
    totals = {name: sum(row) for name, *row in report["classes"][:-1]}
    few = [name for name, total in totals.items() if 0 < total < FEW_SAMPLES]
    empty = [name for name, total in totals.items() if not total]
    if few:
        sentences.append(
            f"{len(few)} of {len(totals)} classes have fewer than {FEW_SAMPLES} "
            f"samples ({_some(few)}): INPUT.JIGSAW.SAMPLING class_balanced shows them more often."
        )
    if empty:
        sentences.append(f"{len(empty)} classes have no sample ({_some(empty)}): never a target.")
    return sentences


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def format_report(report: dict, max_classes: int = 100) -> str:
    """The report as text for the screen."""
    groups = []
    for group, values in report["groups"].items():
        sides = values["size_percentiles"]
        texts = ("|".join(f"{v:.0f}" for v in sides.get(k, [])) or "-" for k in ("width", "height"))
        groups.append([GROUP_NAMES[group], values["positive"], values["negative"], *texts])
    regions = [
        [region, *([f"{share:.1%}" for share in fill.values()] if fill else ["borrows"] * 3)]
        for region, fill in report["template"]["regions"].items()
    ]
    classes = [[*row, sum(row[1:])] for row in report["classes"]]
    rest = len(classes) - max_classes
    if rest > 0:
        classes = sorted(classes[:-1], key=lambda row: -row[4])[: max_classes - 1] + classes[-1:]
    heads = ["group", "positive", "negative", "width 5|50|95 %", "height 5|50|95 %"]
    encoded = [f"{count / 1e6:.1f} MB {name}" for name, count in report["encoded_bytes"].items()]
    parts = [
        f"{report['samples']} samples: {report['positives']} positive, {report['negatives']} "
        f"negative; {', '.join(encoded)}",
        tabulate(groups, heads),
        tabulate(regions, ["region", "used", "padded", "cropped away"], colalign=("left",) * 4),
        tabulate(classes, ["class", "S", "T", "W", "all"])
        + (f"\n... and {rest} smaller classes" if rest > 0 else ""),
    ]
    if fit := report.get("fit"):
        low, high = fit["detector_size"]
        parts.append(
            f"For a detector that shows images at {low:g} to {high:g} pixels (MIN_SIZE_TRAIN, "
            f"MAX_SIZE_TRAIN), INPUT.JIGSAW.FIT_TO auto takes\n{fit['auto']}.\nThe paper's "
            f"{fit['paper']}."
        )
    log = ExtractionLog()
    for entries in report.get("log", {}).values():
        log.merge(entries)
    parts += log.tables()
    return "\n\n".join(parts + [f"! {sentence}" for sentence in report["cautions"]])

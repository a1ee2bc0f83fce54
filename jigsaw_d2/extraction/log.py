"""What extraction skipped or noticed: a fixed list of reasons, each counted, with examples."""

from collections import Counter
from pathlib import Path

from jigsaw_d2.errors import JigsawError

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
    "image_16_bit": (FAULT, "more than 8 bits per channel, which Detectron2's reader saturates"),
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
    "crowd": (RULE, "crowd: no positive, and no negative on it"),
    "box_too_small": (RULE, "annotated box below the minimal side"),
    "box_clipped": (NOTE, "box reached over the border and was clipped"),
    "annotation_id_repeated": (NOTE, "annotation id used twice, for different objects: both kept"),
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


class ExtractionError(JigsawError, ValueError):
    """Input that cannot be extracted, or under --strict, the first fault in it."""


class ExtractionLog:
    """Counts of ``REASONS`` with up to three examples each; picklable, mergeable.

    Args:
        strict: raise ``ExtractionError`` at the first fault.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, reason: str, where: str | Path) -> None:
        """Count ``reason`` once; ``where`` names the file, image or annotation."""
        kind, text = REASONS[reason]
        if self.strict and kind == FAULT:
            raise ExtractionError(f"{where}: {text} ({reason}; stopped because of --strict)")
        self.counts[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(str(where))

    def merge(self, other: "ExtractionLog") -> None:
        """Add the counts of ``other`` behind these."""
        self.counts.update(other.counts)
        for reason, examples in other.examples.items():
            mine = self.examples.setdefault(reason, [])
            mine += examples[: EXAMPLES - len(mine)]

    def to_dict(self) -> dict:
        """{reason: {"count", "kind", "text", "examples"}} in the order of ``REASONS``."""
        return {
            reason: {
                "count": self.counts[reason],
                "kind": kind,
                "text": text,
                "examples": self.examples[reason],
            }
            for reason, (kind, text) in REASONS.items()
            if self.counts[reason]
        }

    @classmethod
    def from_dict(cls, entries: dict, strict: bool = False) -> "ExtractionLog":
        """The log that ``to_dict`` wrote."""
        log = cls(strict)
        for reason, entry in entries.items():
            log.counts[reason] = entry["count"]
            log.examples[reason] = list(entry["examples"])
        return log

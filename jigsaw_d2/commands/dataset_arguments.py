"""Arguments by which ``run``, ``demo`` and ``compare`` name a dataset; their lines of progress."""

import argparse
from pathlib import Path

from jigsaw_d2.jobs.demo_data import DemoOptions, make_demo_set
from jigsaw_d2.jobs.pipeline import DetectionSet, PipelineError


def say(text: str) -> None:
    """A line of progress, at once."""
    print(text, flush=True)


def add_file_arguments(parser: argparse._ActionsContainer, *, required: bool) -> None:
    """--json, --images, --val-json and --val-images."""
    parser.add_argument("--json", required=required, help="training annotations, COCO format")
    parser.add_argument("--images", required=required, help="image folder of --json")
    parser.add_argument("--val-json", required=required, help="held-out annotations")
    parser.add_argument("--val-images", help="image folder of --val-json; default: that of --json")


def files_dataset(args: argparse.Namespace) -> DetectionSet:
    """The dataset of --json, --images, --val-json and --val-images.

    Raises:
        PipelineError: one is missing.
    """
    if not (args.json and args.images and args.val_json):
        raise PipelineError("--json, --images and --val-json go together")
    train_json, images, val_json = (
        Path(part).resolve() for part in (args.json, args.images, args.val_json)
    )
    val_images = Path(args.val_images).resolve() if args.val_images else images
    name = train_json.parent.name if train_json.stem == "train" else train_json.stem
    return DetectionSet(name, train_json, images, val_json, val_images).checked()


def demo_dataset(folder: Path) -> DetectionSet:
    """The demo's set, drawn into ``folder`` unless it is there already."""
    options = DemoOptions()

    def progress(done: int, count: int) -> None:
        if done % 100 == 0 or done == count:
            say(f"draw the set: {done} of {count} images")

    make_demo_set(folder, options, progress)
    return DetectionSet.from_folder(folder)

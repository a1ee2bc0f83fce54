"""Figures of a job: its samples, Jigsaw images, effective receptive fields and soft labels.

Each is what ``visualize.py`` draws for the arguments given here.
"""

import argparse
import importlib
from pathlib import Path

from jigsaw_d2.jobs.job import Job
from jigsaw_d2.jobs.stages import Say

ERF_IMAGES = 2  # a look, not a measurement: minutes matter here


def figure_arguments(job: Job) -> dict[str, list[str]]:
    """Name of each figure -> arguments of ``visualize.py NAME``, without --output."""
    store = str(job.output / "samples" / "train" / "store")
    checkpoint = str(job.output / "pretrain" / "model_final.pth")
    config = str(job.output / "pretrain" / "config.yaml")
    return {
        "samples": [store],
        "jigsaw": [store, "--config-file", config],
        "erf": [
            *("--config-file", config, "--store", store, "--num-images", str(ERF_IMAGES)),
            *("--weights", "random", checkpoint, "--names", "before", "after"),
        ],
        "labels": ["--config-file", config, "--store", store, "--weights", checkpoint],
    }


def draw_figures(job: Job, say: Say) -> list[Path]:
    """Draw what is not drawn yet, or older than the pre-training; paths of the four figures."""
    folder = job.output / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    trained = (job.output / "pretrain" / "model_final.pth").stat().st_mtime
    paths = []
    for name, argv in figure_arguments(job).items():
        path = folder / f"{name}.png"
        if not path.is_file() or path.stat().st_mtime < trained:
            say(f"draw {path}")
            _draw(name, [*argv, "--output", str(path)])
        paths.append(path)
    return paths


def _draw(name: str, argv: list[str]) -> None:
    module = importlib.import_module(f"jigsaw_d2.visualization.{name}")
    parser = argparse.ArgumentParser(prog=f"visualize.py {name}")
    module.add_arguments(parser)
    module.run(parser.parse_args(argv))

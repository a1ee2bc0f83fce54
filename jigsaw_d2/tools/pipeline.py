"""The stages of the whole job, from a COCO-format set to a detector, and what they leave behind.

samples/train, samples/val -> pretrain -> weights -> detector
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from jigsaw_d2.config import get_jigsaw_cfg, scale_to_batch
from jigsaw_d2.cost import read_cost_log
from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.detection.config import SCRATCH, config_changes, load_detection_config
from jigsaw_d2.io import ConfigError, DataError, RunError
from jigsaw_d2.tools.stages import Stage, read_metrics

WARMUP_SHARE = 0.1  # of a shortened training, at most
# Keys that change nothing in a result; datasets are known by their content.
NOT_IN_RESULT = (
    *("DATALOADER.NUM_WORKERS", "DATASETS.COCO_FILES", "DATASETS.TEST", "DATASETS.TRAIN"),
    *("MODEL.DEVICE", "MODEL.JIGSAW.ERF.FIGURES", "OUTPUT_DIR", "SOLVER.CHECKPOINT_PERIOD"),
    *("SOLVER.PEER_TIMEOUT", "VIS_PERIOD"),
)


@dataclass(frozen=True)
class DetectionSet:
    """A COCO-format dataset: two annotation files with their image folders."""

    name: str
    train_json: Path
    train_images: Path
    val_json: Path
    val_images: Path

    @classmethod
    def from_folder(cls, folder: str | Path) -> "DetectionSet":
        """``folder`` with images/, train.json and val.json.

        Raises:
            DataError: one of them is missing.
        """
        folder = Path(folder).resolve()
        images = folder / "images"
        return cls(
            folder.name, folder / "train.json", images, folder / "val.json", images
        ).checked()

    def checked(self) -> "DetectionSet":
        """Itself, if every file is there.

        Raises:
            DataError: naming the first that is not.
        """
        for path in (self.train_json, self.train_images, self.val_json, self.val_images):
            if not path.exists():
                raise DataError(
                    f"{path} does not exist; a dataset is images/, train.json and val.json (COCO)"
                )
        return self

    def catalog_names(self) -> tuple[str, str]:
        """Names for Detectron2's catalog, different for equally named sets at different places."""
        digest = hashlib.sha1(f"{self.train_json} {self.val_json}".encode()).hexdigest()[:6]
        return f"{self.name}-{digest}-train", f"{self.name}-{digest}-val"

    def overrides(self) -> list[str]:
        """KEY VALUE pairs that make a detection config train and test on this set."""
        train, val = self.catalog_names()
        entries = [
            [train, str(self.train_json), str(self.train_images)],
            [val, str(self.val_json), str(self.val_images)],
        ]
        return [
            *("DATASETS.COCO_FILES", repr(entries)),
            *("DATASETS.TRAIN", repr((train,)), "DATASETS.TEST", repr((val,))),
        ]


def extraction_stage(
    data: DetectionSet, split: str, folder: Path, *, seed: int = 0, options: Sequence[str] = ()
) -> Stage:
    """Cut the samples of ``split`` ("train" or "val") into the store ``folder``/store.

    Args:
        options: further arguments of ``extract``.
    """
    annotations, images = (
        (data.train_json, data.train_images)
        if split == "train"
        else (data.val_json, data.val_images)
    )
    store = folder / "store"
    argv = ("--json", str(annotations), "--images", str(images), "--output", str(store))
    argv = ("extract", *argv, "--seed", str(seed), *options)
    settings = {"annotations": file_digest(annotations), "seed": seed, "options": list(options)}
    return Stage(f"extract {split}", argv, folder, store, settings, ("--overwrite",))


def pretraining_stage(
    stores: tuple[Path, Path | None],
    folder: Path,
    config: str,
    overrides: Sequence[str] = (),
    *,
    seed: int = 0,
    num_gpus: int = 1,
    title: str = "pre-train",
) -> Stage:
    """Train a backbone on Jigsaw images of ``stores`` (training, held out or None)."""
    train, held_out = stores
    pairs = [
        *overrides,
        *("DATASETS.TRAIN", repr((str(train),))),
        *("DATASETS.TEST", repr((str(held_out),) if held_out else ())),
        *("SEED", str(seed), "OUTPUT_DIR", str(folder)),
    ]
    cfg = get_jigsaw_cfg(config, pairs)
    argv = ("pretrain", "--config-file", config, "--num-gpus", str(num_gpus), *pairs)
    settings = {"store": SampleStore(train).fingerprint, **config_settings(cfg)}
    steps = scale_to_batch(cfg).SOLVER.MAX_ITER
    return Stage(title, argv, folder, folder / "model_final.pth", settings, ("--resume",), steps)


def conversion_stage(checkpoint: Path, folder: Path) -> Stage:
    """Turn a checkpoint of pre-training into ``folder``/backbone.pkl."""
    output = folder / "backbone.pkl"
    argv = ("convert", "--input", str(checkpoint), "--output", str(output))
    settings = {"checkpoint": file_digest(checkpoint)}
    return Stage("convert", argv, folder, output, settings, ("--force",))


def finetuning_stage(
    data: DetectionSet,
    weights: Path | None,
    folder: Path,
    config: str,
    overrides: Sequence[str] = (),
    *,
    seed: int = 0,
    num_gpus: int = 1,
    title: str = "fine-tune",
) -> Stage:
    """Train and evaluate a detector from converted weights; None = from random weights."""
    pairs = [*overrides, *data.overrides(), "SEED", str(seed), "OUTPUT_DIR", str(folder)]
    cfg = load_detection_config(config, pairs)
    chosen = SCRATCH if weights is None else str(weights)
    argv = ("finetune", "--config-file", config, "--weights", chosen, "--num-gpus", str(num_gpus))
    settings = {
        "weights": SCRATCH if weights is None else file_digest(weights),
        "annotations": [file_digest(data.train_json), file_digest(data.val_json)],
        **config_settings(cfg),
    }
    output, steps = folder / "results.json", cfg.SOLVER.MAX_ITER
    return Stage(title, (*argv, *pairs), folder, output, settings, ("--resume",), steps)


def config_settings(cfg: CfgNode) -> dict[str, Any]:
    """{dotted key: value} of what a config changes in the defaults and a result depends on."""
    changes = flat(config_changes(get_jigsaw_cfg(), cfg))
    return {key: value for key, value in changes.items() if key not in NOT_IN_RESULT}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"A": {"B": 1}} -> {"A.B": 1}."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inner = isinstance(value, Mapping)
        found |= flat(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return found


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def length_overrides(cfg: CfgNode, iterations: int) -> list[str]:
    """KEY VALUE pairs that make a schedule ``iterations`` long, its steps at the same fractions.

    Args:
        cfg: pre-training or detection config; lengths are turned into its reference batch size.

    Raises:
        ConfigError: fewer than 1 iteration.
    """
    if iterations < 1:
        raise ConfigError(f"{iterations} iterations are no training; allow more time")
    solver = cfg.SOLVER
    reference = solver.REFERENCE_BATCH_SIZE or solver.IMS_PER_BATCH
    length = max(1, round(iterations * solver.IMS_PER_BATCH / reference))
    ratio = length / solver.MAX_ITER
    scaled = (max(1, round(step * ratio)) for step in solver.STEPS)
    steps = tuple(dict.fromkeys(step for step in scaled if step < length))
    warmup = min(solver.WARMUP_ITERS, int(length * WARMUP_SHARE))
    return [
        *("SOLVER.MAX_ITER", str(length), "SOLVER.STEPS", repr(steps)),
        *("SOLVER.WARMUP_ITERS", str(warmup)),
    ]


def read_results(folder: Path) -> dict[str, float | None]:
    """Box metrics of a finished fine-tuning: {"AP": percent, "AP50": ..., "AP-<class>": ...}.

    Raises:
        RunError: there are none.
    """
    path = folder / "results.json"
    try:
        return json.loads(path.read_text())["bbox"]
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{path} holds no box results ({error})") from error


def read_curve(folder: Path, iterations: int) -> list[tuple[int, float]]:
    """(iterations done, AP in percent) of the evaluations of a fine-tuning, in order.

    Without those of a detector that found nothing at all: Detectron2 gives them no number.

    Args:
        iterations: of the whole fine-tuning. Detectron2 writes the last evaluation under this very
            number, the earlier ones under that of the step before them.
    """
    points = {
        min(line["iteration"] + 1, iterations): line["bbox/AP"]
        for line in read_metrics(folder)
        if math.isfinite(line.get("bbox/AP", math.nan))
    }
    return sorted(points.items())


def step_seconds(folder: Path) -> float:
    """Wall-clock seconds of a training's step: the median of the last 20, never of its first two.

    Raises:
        RunError: the training was too short to tell.
    """
    times = [line["time"] for line in read_metrics(folder) if "time" in line]
    if not times:
        raise RunError(f"{folder}/metrics.json tells no time of a step: train for more than two")
    return times[-1]


def stage_cost(folder: Path, stage: str) -> dict[str, float]:
    """{"images", "flops", "seconds"} of one stage in a folder's ledger; zeros where it has none."""
    entry = read_cost_log(folder)["stages"].get(stage, {})
    return {key: entry.get(key, 0) for key in ("images", "flops", "seconds")}

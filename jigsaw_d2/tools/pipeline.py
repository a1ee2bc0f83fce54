"""The stages of the whole job, from a COCO-format set to a detector, and what they leave behind.

samples/train, samples/val -> pretrain -> weights -> detector
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from detectron2.config import CfgNode

from jigsaw_d2.config import get_jigsaw_cfg, scale_to_batch
from jigsaw_d2.cost import read_cost_log
from jigsaw_d2.data.cleaning import describe
from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.detection.config import SCRATCH, config_changes, load_detection_config
from jigsaw_d2.detection.data import check_sets, clean_sets
from jigsaw_d2.io import ConfigError, DataError, RunError
from jigsaw_d2.tools.arguments import import_registered
from jigsaw_d2.tools.stages import Stage, read_metrics, say

WARMUP_SHARE = 0.1  # of a shortened training, at most
# Keys that change nothing in a result; datasets are known by their content.
NOT_IN_RESULT = (
    *("DATALOADER.NUM_WORKERS", "DATASETS.COCO_FILES", "DATASETS.TEST", "DATASETS.TRAIN"),
    *("MODEL.DEVICE", "MODEL.JIGSAW.ERF.FIGURES", "OUTPUT_DIR", "SOLVER.CHECKPOINT_PERIOD"),
    *("SOLVER.PEER_TIMEOUT", "VIS_PERIOD"),
)


@dataclass(frozen=True)
class DetectionSet:
    """A COCO-format dataset: two annotation files with their image folders.

    Raises:
        DataError: one of them does not exist.
    """

    name: str
    train_json: Path
    train_images: Path
    val_json: Path
    val_images: Path

    def __post_init__(self) -> None:
        for path in (self.train_json, self.train_images, self.val_json, self.val_images):
            if not path.exists():
                raise DataError(
                    f"{path} does not exist; a dataset is images/, train.json and val.json (COCO)"
                )

    @classmethod
    def from_folder(cls, folder: str | Path) -> "DetectionSet":
        """``folder`` with images/, train.json and val.json."""
        folder = Path(folder).resolve()
        images = folder / "images"
        return cls(folder.name, folder / "train.json", images, folder / "val.json", images)

    def overrides(self) -> list[str]:
        """KEY VALUE pairs that make a detection config train and test on this set.

        Its names in Detectron2's catalog differ from those of an equally named set elsewhere.
        """
        digest = hashlib.sha1(f"{self.train_json} {self.val_json}".encode()).hexdigest()[:6]
        train, val = f"{self.name}-{digest}-train", f"{self.name}-{digest}-val"
        entries = [[train, str(self.train_json), str(self.train_images)]]
        entries += [[val, str(self.val_json), str(self.val_images)]]
        names = ["DATASETS.TRAIN", repr((train,)), "DATASETS.TEST", repr((val,))]
        return ["DATASETS.COCO_FILES", repr(entries), *names]


@dataclass(frozen=True)
class Pipeline:
    """Makes the stages of a dataset; what all of them share, they have from here.

    Attributes:
        pretrain_config, detector_config: as the commands take them.
        register: modules for the stages to import first (--register).
        trust: let configs and weights run code (--trust).
    """

    data: DetectionSet
    pretrain_config: str
    detector_config: str
    num_gpus: int = 1
    register: tuple[str, ...] = ()
    trust: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        import_registered(self.register)

    def pretrain_cfg(self, overrides: Sequence[str]) -> CfgNode:
        """The config of pre-training, not yet scaled to its batch size."""
        return get_jigsaw_cfg(self.pretrain_config, [*overrides], self.trust)

    def detector_cfg(self, overrides: Sequence[str]) -> CfgNode:
        """The config of the detector."""
        return load_detection_config(self.detector_config, overrides, self.trust)

    def check_data(self, overrides: Sequence[str]) -> None:
        """Say what will be used of both sets, and refuse what the last stage would die of.

        Raises:
            DataError: sets of different classes, without objects, without masks to train.
        """
        cfg = self.detector_cfg((*overrides, *self.data.overrides()))
        cleaned = clean_sets(cfg)
        check_sets(cfg, cleaned)
        for path, clean in zip((self.data.train_json, self.data.val_json), cleaned.values()):
            say(f"{describe(path, clean)}\n")

    def extraction(
        self, samples: Path, options: Sequence[str] = (), detector: Sequence[str] = ()
    ) -> list[Stage]:
        """Cut the samples into ``samples``/{train,val}/store; ``options`` of ``extract``.

        ``detector``: overrides of its config, whose image sizes the report gives advice for.
        """
        data, stages = self.data, []
        for split, annotations, images in (
            ("train", data.train_json, data.train_images),
            ("val", data.val_json, data.val_images),
        ):
            folder = samples / split
            argv = ["extract", "--json", str(annotations), "--images", str(images), "--output"]
            argv += [str(folder / "store"), "--seed", str(self.seed), *self.register_flags]
            argv += ["--detector-size", *self._detector_sizes(detector)]
            settings = {"annotations": file_digest(annotations), "seed": self.seed}
            settings |= {"options": [*options], **self._registered}
            stage = (f"extract {split}", (*argv, *options), folder, folder / "store", settings)
            held_out = ("annotations",) if split == "val" else ()
            stages.append(Stage(*stage, "--overwrite", held_out=held_out))
        return stages

    def pretraining(
        self,
        samples: Path,
        folder: Path,
        overrides: Sequence[str],
        title: str = "pre-train",
        detector: Sequence[str] = (),
    ) -> Stage:
        """Train a backbone on Jigsaw images of both stores of ``samples``.

        ``detector``: overrides of its config, whose image sizes INPUT.JIGSAW.FIT_TO auto goes by.
        """
        train, held_out = (str(samples / split / "store") for split in ("train", "val"))
        datasets = ("DATASETS.TRAIN", repr((train,)), "DATASETS.TEST", repr((held_out,)))
        pairs = (*overrides, *datasets, "SEED", str(self.seed), "OUTPUT_DIR", str(folder))
        cfg = self.pretrain_cfg(pairs)
        if cfg.INPUT.JIGSAW.FIT_TO:
            low, high = self._detector_sizes(detector)
            pairs = ("INPUT.MIN_SIZE_TRAIN", f"({low},)", "INPUT.MAX_SIZE_TRAIN", high, *pairs)
            cfg = self.pretrain_cfg(pairs)
        argv = ("pretrain", "--config-file", self.pretrain_config, "--num-gpus")
        argv += (str(self.num_gpus), *self._flags, *pairs)
        store = {"store": SampleStore(train).fingerprint}
        settings = {**store, **config_settings(cfg), **self._registered}
        steps = scale_to_batch(cfg).SOLVER.MAX_ITER
        return Stage(title, argv, folder, folder / "model_final.pth", settings, "--resume", steps)

    def conversion(self, checkpoint: Path, folder: Path, origin: str = "") -> Stage:
        """Turn a checkpoint of pre-training into ``folder``/backbone.pkl; ``origin`` as there."""
        output = folder / "backbone.pkl"
        argv = ("convert", "--input", str(checkpoint), "--output", str(output))
        argv += (*self._flags, *(("--origin", origin) if origin else ()))
        settings = {"checkpoint": file_digest(checkpoint), **self._registered}
        return Stage("convert", argv, folder, output, settings, "--force")

    def finetuning(
        self, weights: Path | None, folder: Path, overrides: Sequence[str], title: str = "fine-tune"
    ) -> Stage:
        """Train and evaluate a detector from converted weights; None = from random weights."""
        data = self.data
        pairs = (*overrides, *data.overrides(), "SEED", str(self.seed), "OUTPUT_DIR", str(folder))
        cfg = self.detector_cfg(pairs)
        argv = ("finetune", "--config-file", self.detector_config, "--num-gpus", str(self.num_gpus))
        argv += ("--weights", str(weights or SCRATCH), *self._flags, *pairs)
        settings = {
            "weights": file_digest(weights) if weights else SCRATCH,
            "annotations": file_digest(data.train_json),
            "held_out": file_digest(data.val_json),
            **config_settings(cfg),
            **self._registered,
        }
        stage = (title, argv, folder, folder / "results.json", settings, "--resume")
        return Stage(*stage, cfg.SOLVER.MAX_ITER, ("held_out",), "--eval-only")

    def _detector_sizes(self, overrides: Sequence[str]) -> tuple[str, str]:
        """The detector's MIN_SIZE_TRAIN, of several their mean, and MAX_SIZE_TRAIN."""
        sizes = self.detector_cfg(overrides).INPUT
        return f"{fmean(sizes.MIN_SIZE_TRAIN):.0f}", str(sizes.MAX_SIZE_TRAIN)

    @property
    def register_flags(self) -> list[str]:
        """--register MODULE of each module, which every command takes."""
        return [word for module in self.register for word in ("--register", module)]

    @property
    def _flags(self) -> list[str]:
        return [*self.register_flags, *(["--trust"] if self.trust else [])]

    @property
    def _registered(self) -> dict[str, list[str]]:
        return {"register": [*self.register]} if self.register else {}


def config_settings(cfg: CfgNode) -> dict[str, Any]:
    """{dotted key: value} of what a config changes in the defaults and a result depends on."""
    changes = config_changes(get_jigsaw_cfg(), cfg)
    return {key: value for key, value in changes.items() if key not in NOT_IN_RESULT}


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
    pairs = ["SOLVER.MAX_ITER", str(length), "SOLVER.STEPS", repr(steps)]
    return [*pairs, "SOLVER.WARMUP_ITERS", str(warmup)]


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

    Without those of a detector that found nothing at all: Detectron2 gives them no number. The last
    alone where the held-out set changed since (results.1.json is of what it was): its own number.

    Args:
        iterations: of the whole fine-tuning. Detectron2 writes the last evaluation under this very
            number, the earlier ones under that of the step before them.
    """
    if any(folder.glob("results.*.json")):
        last = read_results(folder)["AP"]
        return [] if last is None else [(iterations, last)]
    points = {
        min(line["iteration"] + 1, iterations): line["bbox/AP"]
        for line in read_metrics(folder)
        if math.isfinite(line.get("bbox/AP", math.nan))
    }
    return sorted(points.items())


def step_seconds(folder: Path) -> float:
    """Wall-clock seconds of a step: the median of the last 20, never of the first two."""
    return [line["time"] for line in read_metrics(folder) if "time" in line][-1]


def stage_cost(folder: Path, stage: str) -> dict[str, float]:
    """{"images", "flops", "seconds"} of a stage in a folder's cost log; zeros where it has none."""
    entry = read_cost_log(folder)["stages"].get(stage, {})
    return {key: entry.get(key, 0) for key in ("images", "flops", "seconds")}

"""The whole job, from a COCO-format set to a detector, as stages that are skipped once done.

    samples/train, samples/val -> pretrain -> weights -> detector

Each function makes one Stage: the command line that a user could type, and what its result depends
on. ``run``, ``demo`` and ``compare`` differ only in which stages they ask for.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from detectron2.config import CfgNode

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.cost import read_ledger
from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.detection.finetune_config import SCRATCH, load_detection_config, read_passport
from jigsaw_d2.errors import JigsawError
from jigsaw_d2.jobs.stages import Stage
from jigsaw_d2.training.lr_schedule import scale_to_batch

WARMUP_SHARE = 0.1  # of a shortened training, at most


class PipelineError(JigsawError, ValueError):
    """A job that cannot start: files that are missing or lengths that make no sense."""


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
            PipelineError: one of them is missing.
        """
        folder = Path(folder).resolve()
        images = folder / "images"
        return cls(
            folder.name, folder / "train.json", images, folder / "val.json", images
        ).checked()

    def checked(self) -> "DetectionSet":
        """Itself, if every file is there.

        Raises:
            PipelineError: naming the first that is not.
        """
        for path in (self.train_json, self.train_images, self.val_json, self.val_images):
            if not path.exists():
                raise PipelineError(
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
            *("DATASETS.TRAIN", f"('{train}',)"),
            *("DATASETS.TEST", f"('{val}',)"),
        ]


def extraction_stage(
    data: DetectionSet, split: str, folder: Path, *, seed: int = 0, options: Sequence[str] = ()
) -> Stage:
    """Cut the samples of ``split`` ("train" or "val") into the store ``folder``/store.

    Args:
        options: further arguments of ``extract``.
    """
    train = split == "train"
    annotations, images = (
        (data.train_json, data.train_images) if train else (data.val_json, data.val_images)
    )
    store = folder / "store"
    argv = (
        *("extract", "--json", str(annotations), "--images", str(images)),
        *("--output", str(store), "--seed", str(seed), *options),
    )
    inputs = {"json": file_digest(annotations)}
    return Stage(f"extract {split}", argv, folder, (store,), inputs, resumable=True)


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
    argv = ("pretrain", "--config-file", config, "--num-gpus", str(num_gpus))
    inputs = {"store": SampleStore(train).fingerprint}
    iterations = scale_to_batch(get_jigsaw_cfg(config, pairs)).SOLVER.MAX_ITER
    return _training_stage(title, (argv, pairs), folder, "model_final.pth", inputs, iterations)


def conversion_stage(checkpoint: Path, folder: Path, *, title: str = "convert") -> Stage:
    """Turn a checkpoint of pre-training into ``folder``/backbone.pkl."""
    output = folder / "backbone.pkl"
    argv = ("convert", "--input", str(checkpoint), "--output", str(output))
    return Stage(title, argv, folder, (output,), {"checkpoint": file_digest(checkpoint)})


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
    pairs = [
        *overrides,
        *data.overrides(),
        *("SEED", str(seed), "OUTPUT_DIR", str(folder)),
    ]
    chosen = SCRATCH if weights is None else str(weights)
    argv = ("finetune", "--config-file", config, "--weights", chosen, "--num-gpus", str(num_gpus))
    inputs = {
        "weights": read_passport(chosen).digest,
        "train": file_digest(data.train_json),
        "val": file_digest(data.val_json),
    }
    iterations = load_detection_config(config, pairs).SOLVER.MAX_ITER
    return _training_stage(title, (argv, pairs), folder, "results.json", inputs, iterations)


def _training_stage(
    title: str,
    command: tuple[tuple[str, ...], list[str]],
    folder: Path,
    output: str,
    inputs: dict,
    iterations: int,
) -> Stage:
    """A stage whose overrides end the command line, so that --resume goes before them."""
    argv, pairs = command
    return Stage(
        title,
        (*argv, *pairs),
        folder,
        (folder / output,),
        inputs,
        iterations,
        resumable=True,
        resume_argv=("--resume",),
        resume_at=len(argv),
    )


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def length_overrides(cfg: CfgNode, iterations: int) -> list[str]:
    """KEY VALUE pairs that make a schedule ``iterations`` long, its steps at the same fractions.

    Args:
        cfg: pre-training or detection config; lengths are turned into its reference batch size.

    Raises:
        PipelineError: fewer than 1 iteration.
    """
    if iterations < 1:
        raise PipelineError(f"{iterations} iterations are no training; allow more time")
    solver = cfg.SOLVER
    reference = solver.REFERENCE_BATCH_SIZE or solver.IMS_PER_BATCH
    length = max(1, round(iterations * solver.IMS_PER_BATCH / reference))
    ratio = length / solver.MAX_ITER
    steps = tuple(max(1, round(step * ratio)) for step in solver.STEPS if step < solver.MAX_ITER)
    warmup = min(solver.WARMUP_ITERS, int(length * WARMUP_SHARE))
    return [
        *("SOLVER.MAX_ITER", str(length)),
        *("SOLVER.STEPS", repr(steps)),
        *("SOLVER.WARMUP_ITERS", str(warmup)),
    ]


def read_results(folder: Path) -> dict[str, float | None]:
    """Box metrics of a finished fine-tuning: {"AP": percent, "AP50": ..., "AP-<class>": ...}.

    Raises:
        PipelineError: there are none.
    """
    path = folder / "results.json"
    try:
        return json.loads(path.read_text())["bbox"]
    except (OSError, ValueError, KeyError) as error:
        raise PipelineError(f"{path} holds no box results ({error})") from error


def read_curve(folder: Path, iterations: int) -> list[tuple[int, float]]:
    """(iterations done, AP in percent) of every evaluation of a fine-tuning, in order.

    Args:
        iterations: of the whole fine-tuning. Detectron2 writes the last evaluation under this very
            number, the earlier ones under that of the step before them.
    """
    points = {}
    for line in (folder / "metrics.json").read_text().splitlines():
        metrics = json.loads(line)
        if "bbox/AP" in metrics:
            points[min(metrics["iteration"] + 1, iterations)] = metrics["bbox/AP"]
    return sorted(points.items())


def stage_cost(folder: Path, stage: str) -> dict[str, float]:
    """{"images", "flops", "seconds"} of one stage in a folder's ledger; zeros where it has none."""
    entry = read_ledger(folder)["stages"].get(stage, {})
    return {key: entry.get(key, 0) for key in ("images", "flops", "seconds")}

"""Stages of a job: each a command of this project, run as a user would type it, and never twice.

    samples/train, samples/val -> pretrain -> weights -> detector

A stage owns a folder. ``stage.json`` in it holds the settings that its result depends on and the
digests of what it read. So the same call goes on where it stopped, other settings stop with both
shown, and nothing that a stage has made is ever deleted.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.cost import read_ledger
from jigsaw_d2.detection.detection_config import config_changes
from jigsaw_d2.detection.finetune_config import SCRATCH, load_detection_config
from jigsaw_d2.io import ConfigError, DataError, RunError, write_text
from jigsaw_d2.sample_store import SampleStore
from jigsaw_d2.training.lr_schedule import scale_to_batch

STAGE_FILE = "stage.json"
LOG = "stage.log"
PROGRESS_SECONDS = 15.0
WARMUP_SHARE = 0.1  # of a shortened training, at most
# Keys, or nodes of them, that change nothing in a result; datasets are known by their content.
NOT_IN_RESULT = (
    *("DATALOADER.NUM_WORKERS", "DATASETS.COCO_FILES", "DATASETS.TEST", "DATASETS.TRAIN"),
    *("MODEL.DEVICE", "MODEL.JIGSAW.ERF.FIGURES", "OUTPUT_DIR", "SOLVER.CHECKPOINT_PERIOD"),
    *("SOLVER.PEER_TIMEOUT", "VIS_PERIOD"),
)

Say = Callable[[str], None]
Runner = Callable[["Stage", list[str], Say], None]


@dataclass(frozen=True)
class Stage:
    """One command with all that its result depends on.

    Attributes:
        title: what it does, for people.
        argv: the command line behind ``python -m jigsaw_d2``.
        folder: written by this stage alone.
        output: file or folder in it that exists when the stage has succeeded.
        settings: {name: JSON-able value}: what the result depends on, inputs by their digests.
        resume: flags with which the command goes on in a folder that it left half done.
        iterations: of training, to tell progress by; 0 where there is none.
    """

    title: str
    argv: tuple[str, ...]
    folder: Path
    output: Path
    settings: Mapping[str, object]
    resume: tuple[str, ...]
    iterations: int = 0

    @property
    def command(self) -> str:
        """The command line as a user would type it."""
        return f"python -m jigsaw_d2 {shlex.join(self.argv)}"

    def is_done(self) -> bool:
        """Whether this stage has finished, with whichever settings."""
        known = _read_stage(self.folder)
        return known is not None and known["done"] and self.output.exists()

    def run(self, say: Say, runner: Runner | None = None) -> float:
        """Run the command, or go on with it, or find it done.

        Args:
            say: receives lines of progress.
            runner: how to run a command line; by default in a process of its own.

        Returns:
            Wall-clock seconds over all attempts.

        Raises:
            ConfigError: what the folder holds was made with other settings, or is something else.
            RunError: the command failed, or did not write its output.
        """
        known = _read_stage(self.folder)
        if known is None and self.folder.exists() and any(self.folder.iterdir()):
            raise ConfigError(f"{self.folder} holds files of something else: choose another folder")
        if known is not None and (self.output.exists() or any(self.folder.glob("*.pth"))):
            check_same(known["settings"], self.settings, self.folder)
        before = known["seconds"] if known else 0.0
        if self.is_done():
            say(f"{self.title}: done before, in {before:.0f} s")
            return before
        say(f"{self.title}: {'resumed' if known else 'started'}")
        argv = [self.argv[0], *(self.resume if known else ()), *self.argv[1:]]
        self.folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        self._write(before, done=False)
        try:
            (runner or run_subprocess)(self, argv, say)
        finally:
            seconds = before + time.monotonic() - started
            self._write(seconds, done=False)
        if not self.output.exists():
            raise RunError(f"{self.title} ended well but did not write {self.output}")
        self._write(seconds, done=True)
        say(f"{self.title}: finished in {seconds:.0f} s")
        return seconds

    def _write(self, seconds: float, done: bool) -> None:
        content = {"settings": self.settings, "seconds": seconds, "done": done}
        write_text(self.folder / STAGE_FILE, json.dumps(content, indent=1) + "\n")


def _read_stage(folder: Path) -> dict | None:
    path = folder / STAGE_FILE
    if not path.is_file():
        return None
    try:
        known = json.loads(path.read_text())
        return {key: known[key] for key in ("settings", "seconds", "done")}
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} is not of this version: choose another folder") from None


def check_same(old: Mapping[str, object], new: Mapping[str, object], place: Path) -> None:
    """Whether what lies in ``place`` was made with the settings of now.

    Raises:
        ConfigError: showing each setting that differs, old -> new.
    """
    new = json.loads(json.dumps(new))  # tuples as JSON gives them back
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    if names:
        changes = [f"{n}: {old.get(n, '(default)')} -> {new.get(n, '(default)')}" for n in names]
        raise ConfigError(
            f"{place} was made with other settings (there -> now): {'; '.join(changes)}\n"
            "Nothing was changed there. Choose another --output, or the settings of then."
        )


def run_subprocess(stage: Stage, argv: list[str], say: Say) -> None:
    """Run ``python -m jigsaw_d2`` in a process of its own, its output going to ``stage.log``.

    The process holds the log locked, so that no second one works in the same folder, not even
    beside one whose caller was killed.

    Raises:
        RunError: it ended with another status than 0, or another one is at work there.
    """
    log = stage.folder / LOG
    package_root = str(Path(__file__).resolve().parents[2])
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "jigsaw_d2", *argv]
    with log.open("ab") as sink:
        try:
            fcntl.flock(sink, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"another process is at work in {stage.folder}: wait for it") from None
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=environment
        )
        try:
            with exit_on_sigterm():
                status = _watch(process, stage, say)
        except BaseException:  # Ctrl-C and SIGTERM too: no orphan may go on writing into the folder
            process.terminate()
            process.wait()
            raise
    if status != 0:
        end = log.read_text(errors="replace").strip().splitlines()[-15:] or ["no words"]
        raise RunError(
            f"{stage.title} failed with status {status}: {end[-1]}\nThe end of {log}:\n"
            + "\n".join(end)
        )


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM raise SystemExit, so that what runs below can be stopped first."""
    default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not default or threading.current_thread() is not threading.main_thread():
        yield  # a cluster's job has a handler of its own; only the main thread may set one
        return

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _watch(process: subprocess.Popen, stage: Stage, say: Say) -> int:
    """Wait for a process and tell its progress meanwhile; its exit status."""
    told = time.monotonic()
    while True:
        try:
            return process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            pass
        if time.monotonic() - told >= PROGRESS_SECONDS:
            told = time.monotonic()
            say(f"{stage.title}: {progress_text(stage)}")


def progress_text(stage: Stage) -> str:
    """How far a training is, from Detectron2's ``metrics.json`` in its folder."""
    latest = (read_metrics(stage.folder) or [None])[-1]
    if not stage.iterations or latest is None:
        return "at work"
    done = min(latest["iteration"] + 1, stage.iterations)
    loss = latest.get("total_loss")
    return f"iteration {done} of {stage.iterations}" + (
        "" if loss is None else f", loss {loss:.3f}"
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


def read_metrics(folder: Path) -> list[dict]:
    """The lines of Detectron2's ``metrics.json``, without those that a kill has torn."""
    path = folder / "metrics.json"
    found = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict) and "iteration" in line]


def step_seconds(folder: Path) -> float:
    """Wall-clock seconds of a training's step: the median of the last 20, never of its first two.

    Raises:
        RunError: the training was too short to tell.
    """
    times = [line["time"] for line in read_metrics(folder) if "time" in line]
    if not times:
        raise RunError(f"{folder}/metrics.json tells no time of a step: train for more than two")
    return times[-1]


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
    """(iterations done, AP in percent) of every evaluation of a fine-tuning, in order.

    Args:
        iterations: of the whole fine-tuning. Detectron2 writes the last evaluation under this very
            number, the earlier ones under that of the step before them.
    """
    points = {
        min(line["iteration"] + 1, iterations): line["bbox/AP"]
        for line in read_metrics(folder)
        if "bbox/AP" in line
    }
    return sorted(points.items())


def stage_cost(folder: Path, stage: str) -> dict[str, float]:
    """{"images", "flops", "seconds"} of one stage in a folder's ledger; zeros where it has none."""
    entry = read_ledger(folder)["stages"].get(stage, {})
    return {key: entry.get(key, 0) for key in ("images", "flops", "seconds")}

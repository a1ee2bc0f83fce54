"""One dataset to one detector: extract, pre-train, convert, fine-tune; scratch beside it if asked.

OUTPUT/samples/{train,val}/store -> OUTPUT/pretrain -> OUTPUT/weights/backbone.pkl
-> OUTPUT/detector; OUTPUT/scratch; with a time budget also OUTPUT/trial and OUTPUT/lengths.json
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from tabulate import tabulate

from jigsaw_d2.config import get_jigsaw_cfg, scale_to_batch
from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.detection.config import load_detection_config
from jigsaw_d2.io import write_text
from jigsaw_d2.tools import visualize
from jigsaw_d2.tools.pipeline import (
    DetectionSet,
    conversion_stage,
    extraction_stage,
    finetuning_stage,
    length_overrides,
    pretraining_stage,
    read_results,
    stage_cost,
    step_seconds,
)
from jigsaw_d2.tools.stages import Runner, Say, Stage, check_same
from jigsaw_d2.tools.time_budget import DataSize, Lengths, Trial, plan_lengths

# Of each training, to learn its speed. On a GPU the loader's head start alone is dozens of batches.
TRIAL_STEPS = {"cpu": 12, "cuda": 60}
SHOWN_METRICS = ("AP", "AP50", "AP75")
NAMES = {"jigsaw": "Jigsaw pre-training", "scratch": "scratch"}


@dataclass(frozen=True)
class Job:
    """What to do.

    Attributes:
        pretrain_config, detector_config: as the commands take them.
        pretrain, detector: KEY VALUE overrides of each.
        with_scratch: train the same detector from random weights too.
    """

    data: DetectionSet
    output: Path
    pretrain_config: str
    detector_config: str
    pretrain: tuple[str, ...] = ()
    detector: tuple[str, ...] = ()
    seed: int = 0
    num_gpus: int = 1
    with_scratch: bool = False


@dataclass
class JobResult:
    """What came of it.

    Attributes:
        stages: (stage, wall-clock seconds over all attempts, images or samples it saw).
        metrics: {detector: box metrics in percent}.
        explanation: of the lengths that a time budget led to.
    """

    stages: list[tuple[Stage, float, int]] = field(default_factory=list)
    metrics: dict[str, dict[str, float | None]] = field(default_factory=dict)
    explanation: str = ""

    @property
    def seconds(self) -> float:
        """Wall-clock, of all stages."""
        return sum(seconds for _, seconds, _ in self.stages)


class JobRunner:
    """The stages of one job in order; what is done is not done again."""

    def __init__(self, job: Job, say: Say, runner: Runner | None = None) -> None:
        self.job, self.say, self._runner = job, say, runner
        self.result = JobResult()
        samples = job.output / "samples"
        self.stores = samples / "train" / "store", samples / "val" / "store"

    def run(self, seconds: float | None = None) -> JobResult:
        """All stages; with ``seconds``, in training lengths that fit into as many.

        Raises:
            RunError: a stage failed; the same call goes on from there.
            ConfigError: the output has other settings, or ``seconds`` do not suffice.
        """
        self.extract()
        if seconds is not None:
            lengths = self.lengths(seconds)
            self.result.explanation = lengths.explanation
            self.say(lengths.explanation)
            self.job = with_lengths(self.job, lengths)
        trained = self._do(self.pretraining("pretrain"))
        converted = self._do(conversion_stage(trained.output, self.job.output / "weights"))
        self._detect("jigsaw", converted.output, "detector")
        if self.job.with_scratch:
            self._detect("scratch", None, "scratch")
        return self.result

    def extract(self) -> None:
        """The samples of both splits."""
        for split, store in zip(("train", "val"), self.stores):
            self._do(extraction_stage(self.job.data, split, store.parent, seed=self.job.seed))

    def _do(self, stage: Stage) -> Stage:
        """Run a stage and enter it into the table."""
        seconds = stage.run(self.say, self._runner)
        folder = stage.output if stage.argv[0] == "extract" else stage.folder
        names = ("extraction", "pretraining", "finetuning")
        images = sum(int(stage_cost(folder, name)["images"]) for name in names)
        self.result.stages.append((stage, seconds, images))
        return stage

    def _detect(self, name: str, weights: Path | None, folder: str) -> None:
        stage = self._do(self.finetuning(f"fine-tune from {name}", weights, folder))
        self.result.metrics[name] = read_results(stage.folder)

    def pretraining(
        self, folder: str, extra: Sequence[str] = (), title: str = "pre-train"
    ) -> Stage:
        """The stage of the pre-training, with ``extra`` overrides."""
        job = self.job
        return pretraining_stage(
            self.stores,
            job.output / folder,
            job.pretrain_config,
            [*job.pretrain, *extra],
            seed=job.seed,
            num_gpus=job.num_gpus,
            title=title,
        )

    def finetuning(
        self, title: str, weights: Path | None, folder: str, extra: Sequence[str] = ()
    ) -> Stage:
        """The stage of a fine-tuning from ``weights`` (None: random), with ``extra`` overrides."""
        job = self.job
        return finetuning_stage(
            job.data,
            weights,
            job.output / folder,
            job.detector_config,
            [*job.detector, *extra],
            seed=job.seed,
            num_gpus=job.num_gpus,
            title=title,
        )

    def lengths(self, seconds: float) -> Lengths:
        """Lengths for a time budget; decided once, then kept in ``lengths.json``.

        Raises:
            ConfigError: they were decided for another budget, or other settings.
        """
        job, path = self.job, self.job.output / "lengths.json"
        trial = self.trial()
        settings = {"seconds": seconds, "detectors": 2 if job.with_scratch else 1}
        for stage in self._trials():
            settings |= {f"{stage.argv[0]} {key}": v for key, v in stage.settings.items()}
        if path.is_file():
            known = json.loads(path.read_text())
            check_same(known["settings"], settings, path)
            return Lengths(**known["lengths"])
        images = len(json.loads(job.data.train_json.read_text())["images"])
        batches = (
            get_jigsaw_cfg(job.pretrain_config, list(job.pretrain)).SOLVER.IMS_PER_BATCH,
            load_detection_config(job.detector_config, job.detector).SOLVER.IMS_PER_BATCH,
        )
        size = DataSize(len(SampleStore(self.stores[0])), images, *batches)
        lengths = plan_lengths(seconds, self.result.seconds, trial, size, settings["detectors"])
        content = {"settings": settings, "trial": asdict(trial), "lengths": asdict(lengths)}
        write_text(path, json.dumps(content, indent=1) + "\n")
        return lengths

    def _trials(self) -> tuple[Stage, Stage]:
        """The stages that show the speed of both trainings."""
        steps = str(TRIAL_STEPS["cuda" if torch.cuda.is_available() else "cpu"])
        short = ["SOLVER.MAX_ITER", steps, "SOLVER.WARMUP_ITERS", "0", "TEST.EVAL_PERIOD", "0"]
        short += ["SOLVER.BASE_LR", "0.001"]  # the speed is the same, and nothing can diverge
        unscaled = [*short, "SOLVER.REFERENCE_BATCH_SIZE", "0"]
        return (
            self.pretraining("trial/pretrain", unscaled, "trial of the pre-training"),
            self.finetuning(
                "trial of the detector", None, "trial/detector", [*short, "SOLVER.STEPS", "()"]
            ),
        )

    def trial(self) -> Trial:
        """Wall-clock speeds of both trainings, from a few steps of each; needs the samples."""
        first, second = self._trials()
        self._do(first)
        self._do(second)
        devices = self.job.num_gpus  # the ledger counts the seconds of every one
        return Trial(
            step_seconds(first.folder),
            stage_cost(first.folder, "erf_refresh")["seconds"] / devices,
            step_seconds(second.folder),
            stage_cost(second.folder, "evaluation")["seconds"] / devices,
        )


def with_lengths(job: Job, lengths: Lengths) -> Job:
    """The job with both schedules, and the ERF's period, set to ``lengths``."""
    pretrain = list(job.pretrain)
    scaled = scale_to_batch(get_jigsaw_cfg(job.pretrain_config, pretrain))
    # The lengths count steps of this batch size and the rate is scaled to it: no further scaling.
    pretrain += ["SOLVER.REFERENCE_BATCH_SIZE", "0", "SOLVER.BASE_LR", repr(scaled.SOLVER.BASE_LR)]
    pretrain += length_overrides(scaled, lengths.pretrain_iterations)
    pretrain += ["MODEL.JIGSAW.ERF.PERIOD", str(lengths.erf_period)]
    detector_cfg = load_detection_config(job.detector_config, job.detector)
    detector = [*job.detector, *length_overrides(detector_cfg, lengths.detection_iterations)]
    return replace(job, pretrain=tuple(pretrain), detector=tuple(detector))


def default_configs(on_gpu: bool) -> tuple[str, str]:
    """Configs of pre-training and detector for a machine: the paper's R50, or minutes of a CPU."""
    if on_gpu:
        return "jigsaw_R_50.yaml", "finetune/faster_rcnn_R_50_FPN_1x.yaml"
    return "jigsaw_R_18_cpu.yaml", "finetune/faster_rcnn_R_18_FPN_small.yaml"


def draw_figures(job: Job, say: Say) -> list[Path]:
    """Draw what is not drawn yet, or older than the pre-training; paths of the four figures."""
    folder = job.output / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    store = str(job.output / "samples" / "train" / "store")
    checkpoint = job.output / "pretrain" / "model_final.pth"
    config = ("--config-file", str(job.output / "pretrain" / "config.yaml"))
    figures = {
        "samples": [store],
        "jigsaw": [store, *config],
        # Two images: a look, not a measurement, for minutes matter here.
        "erf": [
            *(*config, "--store", store, "--num-images", "2"),
            *("--weights", "random", str(checkpoint), "--names", "before", "after"),
        ],
        "labels": [*config, "--store", store, "--weights", str(checkpoint)],
    }
    paths = []
    for name, argv in figures.items():
        path = folder / f"{name}.png"
        if not path.is_file() or path.stat().st_mtime < checkpoint.stat().st_mtime:
            say(f"draw {path}")
            visualize.main([name, *argv, "--output", str(path)])
        paths.append(path)
    return paths


def result_tables(result: JobResult) -> str:
    """Stage, seconds, images; then AP, AP50 and AP75 of each detector: as Markdown."""
    rows = [
        [stage.title, f"{seconds:.0f}", images or "-"] for stage, seconds, images in result.stages
    ]
    rows.append(["total", f"{result.seconds:.0f}", ""])
    scores = [
        [NAMES[name], *(metrics.get(key) for key in SHOWN_METRICS)]
        for name, metrics in result.metrics.items()
    ]
    right = ("left", "right", "right", "right")
    stages = tabulate(rows, ["stage", "seconds", "images"], tablefmt="pipe", colalign=right[:3])
    head = ["detector from", *SHOWN_METRICS]
    found = tabulate(scores, head, tablefmt="pipe", floatfmt=".2f", missingval="-", colalign=right)
    return f"{stages}\n\n{found}"


def job_report(job: Job, result: JobResult, figures: Sequence[Path]) -> str:
    """The whole report, as Markdown to lie in the job's folder."""
    lengths = f"\n\nLengths: {result.explanation}." if result.explanation else ""
    commands = "\n".join(stage.command for stage, _, _ in result.stages)
    names = [path.relative_to(job.output) for path in figures]
    drawn = "\n\n".join(f"![{name}]({name})" for name in names)
    return (
        f"# {job.data.name}: from annotations to a detector\n\n{result_tables(result)}{lengths}\n\n"
        "Both detectors, if there are two, have the same settings, seed and number of iterations; "
        "the one from scratch did without the pre-training's seconds. One seed: chance is in these "
        "numbers, and `compare.py` is what measures it.\n\n"
        f"## Commands\n\n```\n{commands}\n```\n\n{drawn}".rstrip() + "\n"
    )

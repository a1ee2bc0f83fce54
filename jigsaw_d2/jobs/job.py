"""One dataset to one detector: extract, pre-train, convert, fine-tune; scratch beside it if asked.

OUTPUT/samples/{train,val}/store -> OUTPUT/pretrain -> OUTPUT/weights/backbone.pkl
-> OUTPUT/detector; OUTPUT/scratch
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.detection.finetune_config import load_detection_config
from jigsaw_d2.jobs.pipeline import (
    DetectionSet,
    conversion_stage,
    extraction_stage,
    file_digest,
    finetuning_stage,
    length_overrides,
    pretraining_stage,
    read_results,
    stage_cost,
)
from jigsaw_d2.jobs.stages import Runner, Say, Stage, StageReport, run_stage
from jigsaw_d2.jobs.time_budget import DataSize, Lengths, Trial, plan_lengths
from jigsaw_d2.training.lr_schedule import scale_to_batch

TRIAL_STEPS = 12  # of each training, to learn its speed


@dataclass(frozen=True)
class Job:
    """What to do.

    Attributes:
        pretrain_config, detector_config: as the commands take them.
        pretrain, detector: KEY VALUE overrides of each.
        with_scratch: train the same detector from random weights too.
        title: of the detector's arm, for the table.
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
    """What came of it: (stage, images or samples it saw), and box metrics of each detector."""

    stages: list[tuple[StageReport, int]] = field(default_factory=list)
    metrics: dict[str, dict[str, float | None]] = field(default_factory=dict)
    explanation: str = ""

    @property
    def seconds(self) -> float:
        """Wall-clock, of all stages, over all attempts."""
        return sum(report.seconds for report, _ in self.stages)


class JobRunner:
    """The stages of one job in order; each is skipped if it is done."""

    def __init__(self, job: Job, say: Say, runner: Runner | None = None) -> None:
        self.job, self.say, self._runner = job, say, runner
        self.result = JobResult()

    def run(self, seconds: float | None = None) -> JobResult:
        """All stages; with ``seconds``, in training lengths that fit into as many.

        Raises:
            StageError: a stage failed; the same call goes on from there.
            BudgetError: ``seconds`` do not suffice.
        """
        for split in ("train", "val"):
            self.extract(split)
        if seconds is not None:
            lengths = self.lengths(seconds)
            self.result.explanation = lengths.explanation
            self.say(lengths.explanation)
            self.job = with_lengths(self.job, lengths)
        weights = self.pretrain()
        self.finetune("jigsaw", weights, "detector")
        if self.job.with_scratch:
            self.finetune("scratch", None, "scratch")
        return self.result

    def _do(self, stage: Stage, images: int | None = None) -> Stage:
        """Run a stage and enter it into the table; ``images`` default to the ledger's."""
        report = run_stage(stage, self.say, self._runner)
        if images is None:
            names = ("extraction", "pretraining", "finetuning")
            images = sum(int(stage_cost(stage.folder, name)["images"]) for name in names)
        self.result.stages.append((report, images))
        return stage

    def store(self, split: str) -> Path:
        """Where the samples of a split are."""
        return self.job.output / "samples" / split / "store"

    def extract(self, split: str) -> None:
        """The samples of a split."""
        job = self.job
        folder = self.store(split).parent
        self._do(extraction_stage(job.data, split, folder, seed=job.seed))

    def pretrain(self) -> Path:
        """Pre-train and convert; the converted weights."""
        trained = self._do(self.pretraining(self.job.output / "pretrain"))
        converted = conversion_stage(trained.outputs[0], self.job.output / "weights")
        return self._do(converted).outputs[0]

    def pretraining(self, folder: Path, extra: Sequence[str] = ()) -> Stage:
        """The stage of the pre-training, with ``extra`` overrides."""
        job = self.job
        return pretraining_stage(
            (self.store("train"), self.store("val")),
            folder,
            job.pretrain_config,
            [*job.pretrain, *extra],
            seed=job.seed,
            num_gpus=job.num_gpus,
        )

    def finetune(self, name: str, weights: Path | None, folder: str) -> None:
        """Train the detector from ``weights`` (None: random) and note its metrics."""
        stage = self._do(self.finetuning(f"fine-tune from {name}", weights, folder))
        self.result.metrics[name] = read_results(stage.folder)

    def finetuning(
        self, title: str, weights: Path | None, folder: str, extra: Sequence[str] = ()
    ) -> Stage:
        """The stage of a fine-tuning, with ``extra`` overrides."""
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
        """Lengths for a time budget; decided once, then kept in ``lengths.json``."""
        job, path = self.job, self.job.output / "lengths.json"
        question = {
            "seconds": seconds,
            "job": repr(replace(job, output=Path())),
            "json": [file_digest(job.data.train_json), file_digest(job.data.val_json)],
        }
        if path.is_file():
            known = json.loads(path.read_text())
            if known["question"] == question:
                return Lengths(**known["answer"])
        trial = self.trial()
        detectors = 2 if job.with_scratch else 1
        answer = plan_lengths(seconds, self.result.seconds, trial, self.data_size(), detectors)
        content = {"question": question, "trial": vars(trial), "answer": answer.to_dict()}
        path.write_text(json.dumps(content, indent=1) + "\n")
        return answer

    def trial(self) -> Trial:
        """Speeds of both trainings, from TRIAL_STEPS steps of each, by the ledger."""
        # A small rate: the speed is the same, and nothing can diverge.
        short = ["SOLVER.MAX_ITER", str(TRIAL_STEPS), "SOLVER.WARMUP_ITERS", "0"]
        short += ["SOLVER.BASE_LR", "0.001"]
        off = [*short, "SOLVER.REFERENCE_BATCH_SIZE", "0", "TEST.EVAL_PERIOD", "0"]
        first = self._do(self.pretraining(self.job.output / "trial" / "pretrain", off))
        steps = [*short, "SOLVER.STEPS", "()", "TEST.EVAL_PERIOD", "0"]
        second = self._do(self.finetuning("trial of the detector", None, "trial/detector", steps))
        return Trial(
            stage_cost(first.folder, "pretraining")["seconds"] / TRIAL_STEPS,
            stage_cost(first.folder, "erf_refresh")["seconds"],
            stage_cost(second.folder, "finetuning")["seconds"] / TRIAL_STEPS,
            stage_cost(second.folder, "evaluation")["seconds"],
        )

    def data_size(self) -> DataSize:
        """Sizes that limit the lengths."""
        job = self.job
        images = json.loads(job.data.train_json.read_text())["images"]
        return DataSize(
            len(SampleStore(self.store("train"))),
            len(images),
            get_jigsaw_cfg(job.pretrain_config, list(job.pretrain)).SOLVER.IMS_PER_BATCH,
            load_detection_config(job.detector_config, list(job.detector)).SOLVER.IMS_PER_BATCH,
        )


def with_lengths(job: Job, lengths: Lengths) -> Job:
    """The job with both schedules, and the ERF's period, set to ``lengths``."""
    pretrain = list(job.pretrain)
    pretrain_cfg = get_jigsaw_cfg(job.pretrain_config, pretrain)
    detector_cfg = load_detection_config(job.detector_config, list(job.detector))
    scaled = scale_to_batch(pretrain_cfg)
    # The lengths count steps of this batch size and the rate is scaled to it: no further scaling.
    pretrain += ["SOLVER.REFERENCE_BATCH_SIZE", "0", "SOLVER.BASE_LR", repr(scaled.SOLVER.BASE_LR)]
    pretrain += length_overrides(scaled, lengths.pretrain_iterations)
    pretrain += ["MODEL.JIGSAW.ERF.PERIOD", str(lengths.erf_period)]
    detector = [*job.detector, *length_overrides(detector_cfg, lengths.detection_iterations)]
    return replace(job, pretrain=tuple(pretrain), detector=tuple(detector))


def default_configs(on_gpu: bool) -> tuple[str, str]:
    """Configs of pre-training and detector for a machine: the paper's R50, or minutes of a CPU."""
    if on_gpu:
        return "jigsaw_R_50.yaml", "finetune/faster_rcnn_R_50_FPN_1x.yaml"
    return "jigsaw_R_18_cpu.yaml", "finetune/faster_rcnn_R_18_FPN_small.yaml"

"""One dataset to one detector: extract, pre-train, convert, fine-tune; scratch beside it if asked.

OUTPUT/samples/{train,val}/store -> OUTPUT/pretrain -> OUTPUT/weights/backbone.pkl
-> OUTPUT/detector; OUTPUT/scratch, OUTPUT/scratch_longer; with a time budget also OUTPUT/trial and
OUTPUT/lengths.json
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from tabulate import tabulate

from jigsaw_d2.config import scale_to_batch
from jigsaw_d2.data.store import SampleStore
from jigsaw_d2.io import write_text
from jigsaw_d2.tools import visualize
from jigsaw_d2.tools.pipeline import (
    Pipeline,
    length_overrides,
    read_results,
    stage_cost,
    step_seconds,
)
from jigsaw_d2.tools.stages import Stage, check_same, say
from jigsaw_d2.tools.time_budget import Lengths, Trial, plan_lengths

# Of each training, to learn its speed. On a GPU the loader's head start alone is dozens of batches.
TRIAL_STEPS = {"cpu": 12, "cuda": 60}
SHOWN_METRICS = ("AP", "AP50", "AP75")


def trial_overrides() -> list[str]:
    """KEY VALUE pairs that make a training so short that it tells its speed alone."""
    steps = str(TRIAL_STEPS["cuda" if torch.cuda.is_available() else "cpu"])
    short = ["SOLVER.MAX_ITER", steps, "SOLVER.WARMUP_ITERS", "0", "TEST.EVAL_PERIOD", "0"]
    short += ["SOLVER.BASE_LR", "0.001"]  # the speed is the same, and nothing can diverge
    return [*short, "SOLVER.REFERENCE_BATCH_SIZE", "0", "SOLVER.STEPS", "()"]


@dataclass
class Job:
    """What to do, and what came of it.

    Attributes:
        pretrain, detector: KEY VALUE overrides of the two configs.
        with_scratch: train the same detector from random weights too.
        extraction: further arguments of both extractions.
        equal_cost: and once more for the time that the Jigsaw detector took with pre-training.
        stages: (stage, wall-clock seconds over all attempts, images or samples it saw).
        metrics: {what the detector started from: box metrics in percent}.
        explanation: of the lengths that a time budget led to.
    """

    pipeline: Pipeline
    output: Path
    pretrain: tuple[str, ...] = ()
    detector: tuple[str, ...] = ()
    with_scratch: bool = False
    extraction: tuple[str, ...] = ()
    equal_cost: bool = False
    stages: list[tuple[Stage, float, int]] = field(default_factory=list, init=False)
    metrics: dict[str, dict[str, float | None]] = field(default_factory=dict, init=False)
    explanation: str = field(default="", init=False)

    @property
    def store(self) -> Path:
        """The training samples."""
        return self.output / "samples" / "train" / "store"

    @property
    def seconds(self) -> float:
        """Wall-clock, of all stages so far."""
        return sum(seconds for _, seconds, _ in self.stages)

    def run(self, seconds: float | None = None) -> None:
        """All stages that are not done; with ``seconds``, in lengths that fit into as many.

        Raises:
            RunError: a stage failed; the same call goes on from there.
            ConfigError: the output has other settings, or ``seconds`` do not suffice.
            DataError: a set that some stage could not use.
        """
        self.pipeline.check_data(self.detector)
        self.extract()
        if seconds is not None:
            self.set_lengths(self.lengths(seconds))
            say(self.explanation)
        trained = self._do(self._pretraining("pretrain", "pre-train"))
        converted = self._do(self.pipeline.conversion(trained.output, self.output / "weights"))
        tuned = self._do(self._finetuning("detector", "fine-tune from jigsaw", converted.output))
        self.metrics["Jigsaw pre-training"] = read_results(tuned.folder)
        if self.with_scratch or self.equal_cost:
            scratch = self._do(self._finetuning("scratch", "fine-tune from scratch"))
            self.metrics["scratch, equal steps"] = read_results(scratch.folder)
        if self.equal_cost:
            cfg = self.pipeline.detector_cfg(self.detector)
            longer = length_overrides(cfg, self._steps_of_equal_time(tuned, scratch))
            scratch = self._do(
                self._finetuning("scratch_longer", "fine-tune from scratch, longer", None, *longer)
            )
            self.metrics["scratch, equal time"] = read_results(scratch.folder)

    def _steps_of_equal_time(self, jigsaw: Stage, scratch: Stage) -> int:
        """Steps from scratch that take as long as extraction, pre-training and fine-tuning did."""
        paid = [(self.store, "extraction"), (jigsaw.folder, "finetuning")]
        paid += [(self.output / "pretrain", name) for name in ("pretraining", "erf_refresh")]
        seconds = sum(stage_cost(folder, stage)["seconds"] for folder, stage in paid)
        return round(
            seconds * scratch.iterations / stage_cost(scratch.folder, "finetuning")["seconds"]
        )

    def extract(self) -> None:
        """The samples of both splits; of arrays, their mean and std for every detector."""
        options = (self.extraction, self.detector)
        for stage in self.pipeline.extraction(self.output / "samples", *options):
            self._do(stage)
        header = SampleStore(self.store).header
        if "pixel_mean" in header:  # which one from scratch has no weights to tell
            values = (
                ("MODEL.PIXEL_" + k.upper(), repr(header[f"pixel_{k}"])) for k in ("mean", "std")
            )
            self.detector = (*itertools.chain(*values), *self.detector)

    def _do(self, stage: Stage) -> Stage:
        """Run a stage and enter it into the table."""
        seconds = stage.run()
        folder = stage.output if stage.output.is_dir() else stage.folder
        names = ("extraction", "pretraining", "finetuning")
        images = sum(int(stage_cost(folder, name)["images"]) for name in names)
        self.stages.append((stage, seconds, images))
        return stage

    def _pretraining(self, folder: str, title: str, *extra: str) -> Stage:
        overrides, samples = (*self.pretrain, *extra), self.output / "samples"
        where = samples, self.output / folder
        return self.pipeline.pretraining(*where, overrides, title, self.detector)

    def _finetuning(
        self, folder: str, title: str, weights: Path | None = None, *extra: str
    ) -> Stage:
        overrides = (*self.detector, *extra)
        return self.pipeline.finetuning(weights, self.output / folder, overrides, title)

    def lengths(self, seconds: float) -> Lengths:
        """Lengths for a time budget; decided once, then kept in ``lengths.json``.

        Raises:
            ConfigError: they were decided for another budget.
        """
        trial, path = self.trial(), self.output / "lengths.json"
        settings = {"seconds": seconds, "detectors": 1 + self.with_scratch}
        if path.is_file():
            known = json.loads(path.read_text())
            check_same(known["settings"], settings, path)
            return Lengths(**known["lengths"])
        images = len(json.loads(self.pipeline.data.train_json.read_bytes())["images"])
        batches = (
            self.pipeline.pretrain_cfg(self.pretrain).SOLVER.IMS_PER_BATCH,
            self.pipeline.detector_cfg(self.detector).SOLVER.IMS_PER_BATCH,
        )
        passes = len(SampleStore(self.store)) / (4 * batches[0]), images / batches[1]
        lengths = plan_lengths(seconds, self.seconds, trial, *passes, settings["detectors"])
        dear = trial.detection_step / batches[1] / (trial.pretrain_step / batches[0])
        explanation = (
            f"{lengths.explanation}; an image costs the detector as much as {dear:.3g} Jigsaw "
            "images (the dearer, the sooner pre-training pays)"
        )
        lengths = replace(lengths, explanation=explanation)
        content = {"settings": settings, "trial": asdict(trial), "lengths": asdict(lengths)}
        write_text(path, json.dumps(content, indent=1) + "\n")
        return lengths

    def trial(self) -> Trial:
        """Wall-clock speeds of both trainings, from a few steps of each; needs the samples."""
        short = trial_overrides()
        ours = self._pretraining("trial/pretrain", "trial of the pre-training", *short)
        detector = self._finetuning("trial/detector", "trial of the detector", None, *short)
        first, second = self._do(ours).folder, self._do(detector).folder
        devices = self.pipeline.num_gpus  # the cost log counts the seconds of each
        refresh = stage_cost(first, "erf_refresh")["seconds"] / devices
        evaluation = stage_cost(second, "evaluation")["seconds"] / devices
        return Trial(step_seconds(first), refresh, step_seconds(second), evaluation)

    def set_lengths(self, lengths: Lengths) -> None:
        """Give both schedules, and the ERF's period, these lengths."""
        self.explanation = lengths.explanation
        cfg = scale_to_batch(self.pipeline.pretrain_cfg(self.pretrain))
        # The lengths count steps of this batch size and the rate is scaled to it: once is enough.
        self.pretrain += ("SOLVER.REFERENCE_BATCH_SIZE", "0")
        self.pretrain += ("SOLVER.BASE_LR", repr(cfg.SOLVER.BASE_LR))
        self.pretrain += tuple(length_overrides(cfg, lengths.pretrain_iterations))
        self.pretrain += ("MODEL.JIGSAW.ERF.PERIOD", str(lengths.erf_period))
        cfg = self.pipeline.detector_cfg(self.detector)
        self.detector += tuple(length_overrides(cfg, lengths.detection_iterations))

    def draw_figures(self) -> list[Path]:
        """Draw what is not drawn yet; paths of the four figures."""
        folder, store = self.output / "figures", str(self.store)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = str(self.output / "pretrain" / "model_final.pth")
        config = ("--config-file", str(self.output / "pretrain" / "config.yaml"))
        figures = {
            "samples": [store],
            "jigsaw": [store, *config],
            # Two images: a look, not a measurement, for minutes matter here.
            "erf": [
                *(*config, "--store", store, "--num-images", "2"),
                *("--weights", "random", checkpoint, "--names", "before", "after"),
            ],
            "labels": [*config, "--store", store, "--weights", checkpoint],
        }
        # What the config names to run, the command line has to name too.
        key, cfg = "MODEL.JIGSAW.BACKBONE_FROM", self.pipeline.pretrain_cfg(self.pretrain)
        program = cfg.MODEL.JIGSAW.BACKBONE_FROM
        for name, argv in figures.items():
            path = str(folder / f"{name}.png")
            if not Path(path).is_file():
                say(f"draw {path}")
                argv = [name, *argv, "--output", path, *self.pipeline.register_flags]
                named = ["--opts", key, program] if program and name != "samples" else []
                visualize.main([*argv, *named])
        return [folder / f"{name}.png" for name in figures]

    def tables(self) -> str:
        """Stage, seconds, images; then AP, AP50 and AP75 of each detector: as Markdown."""
        rows = [[stage.title, f"{s:.0f}", images or "-"] for stage, s, images in self.stages]
        rows.append(["total", f"{self.seconds:.0f}", ""])
        scores = [[name, *map(found.get, SHOWN_METRICS)] for name, found in self.metrics.items()]
        style = {"tablefmt": "pipe", "floatfmt": ".2f", "missingval": "-"}
        right = ("left", "right", "right", "right")
        stages = tabulate(rows, ["stage", "seconds", "images"], colalign=right[:3], **style)
        head = ["detector from", *SHOWN_METRICS]
        return f"{stages}\n\n{tabulate(scores, head, colalign=right, **style)}"

    def report(self, figures: Sequence[Path]) -> str:
        """The whole report, as Markdown to lie in the job's folder."""
        lengths = f"\n\nLengths: {self.explanation}." if self.explanation else ""
        commands = "\n".join(stage.command for stage, _, _ in self.stages)
        drawn = "\n\n".join(f"![{path.name}](figures/{path.name})" for path in figures)
        return (
            f"# {self.pipeline.data.name}: from annotations to a detector\n\n{self.tables()}"
            f"{lengths}\n\nAll detectors have the same settings and seed, but norms are frozen "
            "where weights bring their statistics, and train from scratch. At equal steps, scratch "
            "did without the pre-training's seconds; at equal time, it trained on for as many. One "
            "seed: chance is in these numbers, and `compare.py` is what measures it.\n\n"
            f"## Commands\n\n```\n{commands}\n```\n\n{drawn}".rstrip() + "\n"
        )


def default_configs(on_gpu: bool) -> tuple[str, str]:
    """Configs of pre-training and detector for a machine: the paper's R50, or minutes of a CPU."""
    if on_gpu:
        return "jigsaw_R_50.yaml", "finetune/faster_rcnn_R_50_FPN_1x.yaml"
    return "jigsaw_R_18_cpu.yaml", "finetune/faster_rcnn_R_18_FPN_small.yaml"

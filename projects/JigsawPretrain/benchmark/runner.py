"""Runs a comparison's plan: every arm with every seed, each stage once, failures noted.

OUTPUT/samples*/{train,val}             stores, one pair for each way to extract
OUTPUT/runs/<arm>/<seed>/{trial,pretrain,weights,detector}
"""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from detectron2.config import CfgNode

from benchmark.plan import Arm, Plan
from jigsaw_d2.config import scale_to_batch
from jigsaw_d2.io import ConfigError, JigsawError
from jigsaw_d2.tools.job import trial_overrides
from jigsaw_d2.tools.pipeline import (
    DetectionSet,
    file_digest,
    length_overrides,
    read_curve,
    read_results,
    stage_cost,
    step_seconds,
)
from jigsaw_d2.tools.stages import Stage, say

if TYPE_CHECKING:
    from benchmark.pool import Pool

DONE, FAILED, PENDING, REFUSED = "done", "failed", "not run", "refused"
BEFORE = ("extraction", "pretraining", "erf_refresh")  # what is paid before detection
LIGHTLY_SCRIPT = Path(__file__).with_name("lightly_pretrain.py")


class NotYet(Exception):
    """Why a run cannot go on now; what has finished is kept, and the same command goes on."""


@dataclass
class Run:
    """One arm with one seed, and what came of it."""

    arm: Arm
    index: int  # of the seed in the plan; runs of two arms with the same index are a pair
    seed: int
    status: str = PENDING
    error: str = ""  # why it failed or did not run, in one line
    metrics: dict[str, float | None] = field(default_factory=dict)  # of boxes, percent
    curve: list[tuple[int, float]] = field(default_factory=list)  # (iterations done, AP)
    costs: dict[str, dict[str, float]] = field(default_factory=dict)  # of ``stage_cost``
    iterations: dict[str, int] = field(default_factory=dict)  # "pretraining", "detection"
    commands: list[str] = field(default_factory=list)  # as typed, in order

    def __str__(self) -> str:
        return f"{self.arm.name}, seed {self.seed}"

    def cost_before_detection(self, unit: str) -> float:
        """Seconds or FLOPs spent on extraction, pre-training and ERF refreshes."""
        return sum(self.costs[stage][unit] for stage in BEFORE if stage in self.costs)

    def cost_of_an_iteration(self, unit: str) -> float:
        """Seconds or FLOPs of one detection iteration."""
        return self.costs["finetuning"][unit] / self.iterations["detection"]

    def cost_curve(self, unit: str) -> list[tuple[float, float]]:
        """(total cost up to then, AP in percent) of each evaluation; none of an unfinished run."""
        if self.status != DONE:
            return []
        before, step = self.cost_before_detection(unit), self.cost_of_an_iteration(unit)
        return [(before + step * done, ap) for done, ap in self.curve]


class Comparison:
    """A plan, a dataset and a folder; ``execute`` goes on wherever it was left."""

    def __init__(
        self, plan: Plan, data: DetectionSet, output: str | Path, minutes: float | None = None
    ) -> None:
        """``minutes``: start no further stage after as many; None = go on to the end."""
        self.plan, self.data = plan.checked(), data
        self.output = Path(output).resolve()
        self._deadline = None if minutes is None else time.time() + 60 * minutes
        self.runs = [
            Run(arm, index, seed + arm.seed_offset)
            for arm in sorted(plan.arms, key=lambda arm: arm.waits)
            for index, seed in enumerate(plan.seeds)
        ]

    def execute(
        self, after_run: Callable[[], None] = lambda: None, pool: "Pool | None" = None
    ) -> list[Run]:
        """Run what is not done.

        Args:
            after_run: called after each run, e.g. for a report.
            pool: for several runs at once; None = one after another, in this process.

        Raises:
            ConfigError: the folder holds a comparison of other settings; nothing is changed there.
            DataError: a set that some stage could not use.
        """
        self.plan.pipeline(self.data).check_data(self.plan.detector)
        if pool:  # two runs must not cut the same store
            for arm in (arm for arm in self.plan.arms if arm.kind == "jigsaw"):
                with suppress(JigsawError, OSError, NotYet):  # the run will say so
                    self._samples(Run(arm, 0, 0))
        for waiting in (False, True):
            wave = [run for run in self.runs if run.arm.waits == waiting]
            finished = pool.map(self, wave) if pool else map(self.execute_run, wave)
            for run in finished:
                if run.status == REFUSED:
                    raise ConfigError(run.error)
                self.runs = [run if str(run) == str(other) else other for other in self.runs]
                say(f"{run}: {run.status}" + (f" ({run.error})" if run.error else ""))
                after_run()
        return self.runs

    def execute_run(self, run: Run) -> Run:
        """``run`` with all its stages done, or with the reason why not."""
        run = Run(run.arm, run.index, run.seed, FAILED)
        say(f"{run}: begun")
        try:
            self._execute(run)
            run.status = DONE
        except NotYet as reason:
            run.status, run.error = PENDING, str(reason)
        except ConfigError as error:
            run.status, run.error = REFUSED, str(error)
        except (JigsawError, OSError) as error:
            run.error = str(error).strip().splitlines()[0]
            say(f"{run}: {error}")
        return run

    def _execute(self, run: Run) -> None:
        ways = {"jigsaw": self._pretrain, "direct": self._direct, "lightly": self._lightly}
        weights = ways[run.arm.kind](run) if run.arm.kind in ways else run.arm.weights
        pipeline, overrides = self.plan.pipeline(self.data, run.seed), [*self.plan.detector]
        if run.arm.kind == "direct":  # goes on as it was, with nothing frozen
            overrides += ["MODEL.BACKBONE.FREEZE_AT", "0"]
        cfg = pipeline.detector_cfg(overrides)
        iterations = self.plan.detection_iterations or cfg.SOLVER.MAX_ITER
        if run.arm.kind == "scratch" and self.plan.budget == "total":
            iterations = self._iterations_of_equal_cost(run, overrides) or iterations
        run.iterations["detection"] = iterations
        if iterations != cfg.SOLVER.MAX_ITER:
            overrides += length_overrides(cfg, iterations)
        if self.plan.evaluations > 1:
            # Rounded up: the last one is the end itself, not one step before it.
            overrides += ["TEST.EVAL_PERIOD", str(-(-iterations // self.plan.evaluations))]
        folder = self.folder(run) / "detector"
        self._do(run, pipeline.finetuning(weights, folder, overrides), "finetuning", "evaluation")
        run.metrics, run.curve = read_results(folder), read_curve(folder, iterations)

    def folder(self, run: Run) -> Path:
        """Of one run."""
        return self.output / "runs" / run.arm.slug / f"seed{run.seed}"

    def _pretrain(self, run: Run) -> Path:
        """Converted weights of a Jigsaw arm."""
        samples, pipeline = self._samples(run), self.plan.pipeline(self.data, run.seed)
        run.costs["extraction"] = stage_cost(samples / "train" / "store", "extraction")
        overrides = [*self.plan.pretrain, *run.arm.pretrain]
        cfg = pipeline.pretrain_cfg(overrides)
        length = scale_to_batch(cfg).SOLVER.MAX_ITER
        iterations = max(1, round((self.plan.pretrain_iterations or length) * run.arm.length))
        run.iterations["pretraining"] = iterations
        if iterations != length:
            overrides += length_overrides(cfg, iterations)
        where = samples, self.folder(run) / "pretrain"
        stage = pipeline.pretraining(*where, overrides, detector=self.plan.detector)
        self._do(run, stage, "pretraining", "erf_refresh")
        converted = pipeline.conversion(stage.output, self.folder(run) / "weights")
        self._do(run, converted)
        return converted.output

    def _samples(self, run: Run) -> Path:
        """Folder of the samples, extracted as the run's arm wants them."""
        way = "".join(char if char.isalnum() else "-" for char in "".join(run.arm.extract))
        folder = self.output / f"samples{way}"
        pipeline = self.plan.pipeline(self.data)
        for stage in pipeline.extraction(folder, run.arm.extract, self.plan.detector):
            self._do(run, stage)
        return folder

    def _direct(self, run: Run) -> Path:
        """A detector trained on small images, in as many iterations as the Jigsaw run's cost is."""
        pipeline = self.plan.pipeline(self.data, run.seed)
        budget = self.budget(run.index, self.plan.cost)
        small = [*self.plan.detector]
        small += small_images_overrides(pipeline.detector_cfg(small))
        step = self._step_cost(run, small)
        run.iterations["pretraining"] = iterations = max(1, round(budget / step))
        small += length_overrides(pipeline.detector_cfg(small), iterations)
        small += ["TEST.EVAL_PERIOD", "0"]
        where = self.folder(run) / "pretrain"
        stage = pipeline.finetuning(None, where, small, "pre-train directly")
        self._do(run, stage)
        run.costs["pretraining"] = stage_cost(stage.folder, "finetuning")
        return stage.folder / "model_final.pth"

    def _lightly(self, run: Run) -> Path:
        """Converted weights of LightlyTrain, pre-trained for as many seconds as the Jigsaw run."""
        plan, pipeline = self.plan, self.plan.pipeline(self.data, run.seed)
        cfg, folder = pipeline.detector_cfg(plan.detector), self.folder(run) / "pretrain"
        seconds = f"{self.budget(run.index, 'seconds'):.1f}"
        options = (f"model=torchvision/resnet{cfg.MODEL.RESNETS.DEPTH}", *plan.lightly)
        accelerator = "gpu" if cfg.MODEL.DEVICE.startswith("cuda") else "cpu"
        argv = (str(LIGHTLY_SCRIPT), "--json", str(self.data.train_json), "--images")
        argv += (str(self.data.train_images), "--output", str(folder), "--seconds", seconds)
        argv += ("--seed", str(run.seed), "--accelerator", accelerator, *options)
        settings = {"annotations": file_digest(self.data.train_json), "seed": run.seed}
        settings |= {"seconds": seconds, "options": options}
        title, output = "pre-train with LightlyTrain", folder / "weights.pth"
        program = (plan.lightly_python,)
        stage = Stage(title, argv, folder, output, settings, "--resume", program=program)
        self._do(run, stage)
        done = json.loads((folder / "progress.json").read_text())
        if done["done"] < 0.9 * done["steps"]:  # the rate has not fallen to its end
            cut = f"after {done['done']} of {done['steps']} steps"
            say(f"{run}: the time was over {cut}: the machine was faster in LightlyTrain's trial")
        run.iterations["pretraining"] = done["done"]
        run.costs["pretraining"] = {"flops": 0, **{k: done[k] for k in ("images", "seconds")}}
        converted = pipeline.conversion(output, self.folder(run) / "weights", "lightly_train")
        self._do(run, converted)
        return converted.output

    def _do(self, run: Run, stage: Stage, *costs: str) -> None:
        """Run a stage, note its command and those of its costs that are named."""
        if self._deadline is not None and time.time() > self._deadline and not stage.is_done():
            raise NotYet("the time allowed was over")
        stage.run()
        run.commands.append(stage.command)
        run.costs |= {name: stage_cost(stage.folder, name) for name in costs}

    def _iterations_of_equal_cost(self, run: Run, overrides: list[str]) -> int:
        """Detection iterations from scratch for what the Jigsaw run cost in all; 0 = there is none.

        Of the dearest Jigsaw run with the same seed index, so that each pair has equal cost and
        further seeds do not change runs that are done. At the price of scratch's own iterations,
        which is not that of the Jigsaw run's: there norm and stages may be frozen.

        Raises:
            NotYet: as ``budget``.
        """
        unit, paid = self.plan.cost, self._jigsaw_runs(run.index)
        if not paid:
            return 0
        total = max(r.cost_before_detection(unit) + r.costs["finetuning"][unit] for r in paid)
        return max(1, round(total / self._step_cost(run, overrides)))

    def _step_cost(self, run: Run, overrides: list[str]) -> float:
        """Cost of one detection iteration from random weights, by a trial of a few."""
        pipeline = self.plan.pipeline(self.data, run.seed)
        where, settings = self.folder(run) / "trial", [*overrides, *trial_overrides()]
        trial = pipeline.finetuning(None, where, settings, "trial of the detector from scratch")
        self._do(run, trial)
        if self.plan.cost == "flops":
            return stage_cost(trial.folder, "finetuning")["flops"] / trial.iterations
        return step_seconds(trial.folder) * pipeline.num_gpus

    def budget(self, index: int, unit: str) -> float:
        """Seconds or FLOPs before detection of the dearest Jigsaw run with the same seed index.

        Raises:
            NotYet: one of these Jigsaw runs is not done.
        """
        return max(run.cost_before_detection(unit) for run in self._jigsaw_runs(index))

    def _jigsaw_runs(self, index: int) -> list[Run]:
        paid = [run for run in self.runs if run.arm.kind == "jigsaw" and run.index == index]
        for run in paid:
            if run.status != DONE:
                raise NotYet(f"its length follows from what {run} costs, which is {run.status}")
        return paid


def small_images_overrides(cfg: CfgNode) -> list[str]:
    """KEY VALUE pairs of direct pre-training: both sides halved, four times the batch and rate.

    A batch then has as many pixels as before; the warm-up stays.
    """
    solver, sizes = cfg.SOLVER, tuple(size // 2 for size in cfg.INPUT.MIN_SIZE_TRAIN)
    pairs = ["INPUT.MIN_SIZE_TRAIN", repr(sizes)]
    pairs += ["INPUT.MAX_SIZE_TRAIN", str(cfg.INPUT.MAX_SIZE_TRAIN // 2)]
    pairs += ["SOLVER.IMS_PER_BATCH", str(4 * solver.IMS_PER_BATCH)]
    return [*pairs, "SOLVER.BASE_LR", repr(4 * solver.BASE_LR)]

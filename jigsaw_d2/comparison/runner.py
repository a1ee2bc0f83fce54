"""Runs a comparison's plan: every arm with every seed, each stage once, failures noted.

OUTPUT/samples-<n>/{train,val}          stores, one pair for each way to extract
OUTPUT/runs/<arm>/<seed>/{pretrain,weights,detector}
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from detectron2.config import CfgNode

from jigsaw_d2.comparison.plan import Arm, ComparisonError, Plan
from jigsaw_d2.config import get_jigsaw_cfg, scale_to_batch
from jigsaw_d2.detection.config import load_detection_config
from jigsaw_d2.errors import JigsawError
from jigsaw_d2.jobs.pipeline import (
    DetectionSet,
    conversion_stage,
    extraction_stage,
    finetuning_stage,
    length_overrides,
    pretraining_stage,
    read_curve,
    read_results,
    stage_cost,
)
from jigsaw_d2.jobs.stages import Runner, Say, Stage, is_done, run_stage

logger = logging.getLogger(__name__)

DONE, FAILED, PENDING = "done", "failed", "not run"


class OutOfTime(Exception):
    """The time allowed is over; what has finished is kept."""


@dataclass
class Run:
    """One arm with one seed, and what came of it.

    Attributes:
        index: of the seed in the plan; runs of two arms with the same index are a pair.
        status: DONE, FAILED or PENDING.
        error: first line of the reason, if it failed.
        metrics: box metrics in percent, None where not defined.
        curve: (detection iterations done, AP in percent).
        costs: {"extraction" | "pretraining" | "erf_refresh" | "finetuning" | "evaluation":
            {"images", "flops", "seconds"}}.
        iterations: {"pretraining", "detection"}.
        commands: as typed, in order.
    """

    arm: Arm
    index: int
    seed: int
    status: str = PENDING
    error: str = ""
    metrics: dict[str, float | None] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    iterations: dict[str, int] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)

    def cost_before_detection(self, unit: str) -> float:
        """Seconds or FLOPs spent on extraction, pre-training and ERF refreshes."""
        stages = ("extraction", "pretraining", "erf_refresh")
        return sum(self.costs.get(stage, {}).get(unit, 0.0) for stage in stages)

    def detection_cost_per_iteration(self, unit: str) -> float:
        """Seconds or FLOPs of one detection iteration."""
        return self.costs["finetuning"][unit] / self.iterations["detection"]


class Comparison:
    """A plan, a dataset and a folder; ``execute`` goes on wherever it was left."""

    def __init__(
        self,
        plan: Plan,
        data: DetectionSet,
        output: str | Path,
        say: Say,
        *,
        minutes: float | None = None,
        runner: Runner | None = None,
    ) -> None:
        """
        Args:
            say: receives lines of progress.
            minutes: start no further stage after as many; None = go on to the end.
            runner: as for ``run_stage``.
        """
        self.plan = plan.checked()
        self.data = data
        self.output = Path(output).resolve()
        self.say = say
        self._runner = runner
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.runs = [
            Run(arm, index, seed + arm.seed_offset)
            for arm in _costly_first(plan.arms)
            for index, seed in enumerate(plan.seeds)
        ]

    def execute(self, after_run: Callable[[], None] = lambda: None) -> list[Run]:
        """Run what is not done; ``after_run`` is called after each run, e.g. for a report."""
        for number, run in enumerate(self.runs, start=1):
            self.say(f"run {number} of {len(self.runs)}: {run.arm.name}, seed {run.seed}")
            try:
                self._execute(run)
                run.status = DONE
            except OutOfTime:
                self.say("the time allowed is over; the same command goes on from here")
                break
            except (JigsawError, OSError) as error:
                run.status, run.error = FAILED, str(error).strip().splitlines()[0]
                logger.exception("%s, seed %d", run.arm.name, run.seed)
                self.say(f"run failed: {error}")
            after_run()
        return self.runs

    def _execute(self, run: Run) -> None:
        folder = self.folder(run)
        if run.arm.kind == "jigsaw":
            weights = self._pretrain(run, folder)
        else:
            weights = run.arm.weights
        cfg = self.detector_cfg()
        extra = self.extra_iterations(run.index) if run.arm.kind == "scratch" else 0
        iterations = (self.plan.detection_iterations or cfg.SOLVER.MAX_ITER) + extra
        run.iterations["detection"] = iterations
        stage = finetuning_stage(
            self.data,
            weights,
            folder / "detector",
            self.plan.detector_config,
            self._detector_overrides(cfg, iterations),
            seed=run.seed,
            num_gpus=self.plan.num_gpus,
        )
        self._do(run, stage)
        for name in ("finetuning", "evaluation"):
            run.costs[name] = stage_cost(stage.folder, name)
        run.metrics, run.curve = read_results(stage.folder), read_curve(stage.folder, iterations)

    def folder(self, run: Run) -> Path:
        """Of one run."""
        return self.output / "runs" / run.arm.slug / f"seed{run.seed}"

    def _pretrain(self, run: Run, folder: Path) -> Path:
        """Converted weights of a Jigsaw arm."""
        stores = self._stores(run)
        run.costs["extraction"] = stage_cost(stores[0].parent, "extraction")
        overrides = [*self.plan.pretrain, *run.arm.pretrain]
        cfg = scale_to_batch(get_jigsaw_cfg(self.plan.pretrain_config, overrides))
        base = self.plan.pretrain_iterations or cfg.SOLVER.MAX_ITER
        iterations = max(1, round(base * run.arm.length))
        run.iterations["pretraining"] = iterations
        if iterations != cfg.SOLVER.MAX_ITER:
            cfg = get_jigsaw_cfg(self.plan.pretrain_config, overrides)
            overrides += length_overrides(cfg, iterations)
        stage = pretraining_stage(
            stores,
            folder / "pretrain",
            self.plan.pretrain_config,
            overrides,
            seed=run.seed,
            num_gpus=self.plan.num_gpus,
        )
        self._do(run, stage)
        for name in ("pretraining", "erf_refresh"):
            run.costs[name] = stage_cost(stage.folder, name)
        converted = conversion_stage(stage.outputs[0], folder / "weights")
        self._do(run, converted)
        return converted.outputs[0]

    def _stores(self, run: Run) -> tuple[Path, Path]:
        """Stores of an arm: training, held out."""
        ways = list(dict.fromkeys(arm.extract for arm in self.plan.arms if arm.kind == "jigsaw"))
        folder = self.output / f"samples-{ways.index(run.arm.extract)}"
        stages = [
            extraction_stage(self.data, split, folder / split, options=run.arm.extract)
            for split in ("train", "val")
        ]
        for stage in stages:
            self._do(run, stage)
        return stages[0].outputs[0], stages[1].outputs[0]

    def _do(self, run: Run, stage: Stage) -> None:
        over = self._deadline is not None and time.monotonic() > self._deadline
        if over and not is_done(stage):
            raise OutOfTime
        run.commands.append(run_stage(stage, self.say, self._runner).command)

    def detector_cfg(self) -> CfgNode:
        """The detection config that all arms share, before the dataset and the weights."""
        return load_detection_config(self.plan.detector_config, list(self.plan.detector))

    def _detector_overrides(self, cfg: CfgNode, iterations: int) -> list[str]:
        overrides = list(self.plan.detector)
        if iterations != cfg.SOLVER.MAX_ITER:
            overrides += length_overrides(cfg, iterations)
        if self.plan.evaluations > 1:
            # Rounded up: the last one is the end itself, not one step before it.
            period = -(-iterations // self.plan.evaluations)
            overrides += ["TEST.EVAL_PERIOD", str(period)]
        return overrides

    def extra_iterations(self, index: int) -> int:
        """Detection iterations that arms from scratch get for what pre-training cost.

        The dearest Jigsaw run with the same seed index counts, so that each pair has equal cost and
        further seeds do not change runs that are done. Where none of them finished, all finished
        ones stand in. A run's price is divided by its own cost of a detection iteration.
        """
        paid = [run for run in self.runs if run.arm.kind == "jigsaw" and run.status == DONE]
        if self.plan.budget != "total" or not paid:
            return 0
        same = [run for run in paid if run.index == index] or paid
        return max(map(self._price_in_iterations, same))

    def _price_in_iterations(self, run: Run) -> int:
        """Detection iterations that cost what a run spent before detection, rounded up."""
        step = run.detection_cost_per_iteration(self.plan.cost)
        if step <= 0:
            raise ComparisonError(
                f"the ledger counts no {self.plan.cost} for detection; choose another --cost"
            )
        return -int(-run.cost_before_detection(self.plan.cost) // step)


def _costly_first(arms: Sequence[Arm]) -> list[Arm]:
    """Arms with a pre-training before those from scratch, whose length depends on its cost."""
    return sorted(arms, key=lambda arm: arm.kind == "scratch")

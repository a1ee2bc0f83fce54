"""A runner of stages that computes nothing: it writes what each command would leave behind."""

import json
from pathlib import Path

from helpers_store import make_store

from benchmark.demo_data import DemoOptions, make_demo_set
from jigsaw_d2.cost import record_stage
from jigsaw_d2.io import RunError
from jigsaw_d2.tools.pipeline import DetectionSet
from jigsaw_d2.tools.stages import run_subprocess

# What ``stages`` calls to run a command; tests put a FakeRunner in its place.
RUN = "jigsaw_d2.tools.stages.run_subprocess"


def tiny_set(folder: Path, train_images: int = 4, val_images: int = 2) -> DetectionSet:
    """A demo set of a few images."""
    options = DemoOptions(train_images=train_images, val_images=val_images)
    return make_demo_set(folder, options)


def flag(argv: list[str], name: str) -> str:
    """Value behind the last occurrence of a flag or a key, which is the one that counts."""
    return argv[len(argv) - argv[::-1].index(name)]


class FakeRunner:
    """Pre-training costs 60 s; AP is what ``score(weights, seed)`` says.

    A detection step costs 2 s, from random weights ``scratch_step``. On N GPUs the ledger holds N
    times as many seconds.
    """

    def __init__(
        self, score=lambda weights, seed: 10.0, fail=lambda argv: False, scratch_step: float = 2.0
    ):
        self.calls, self._score, self._fail = [], score, fail
        self._scratch_step = scratch_step

    def __call__(self, stage, argv):
        if stage.program[0] != "python":  # a test's own, which computes nothing either
            return run_subprocess(stage, argv)
        self.calls.append(argv)
        config = f"OUTPUT_DIR: {stage.folder}\nSOLVER:\n  LENGTH: {len(argv)}\n"
        (stage.folder / "config.yaml").write_text(config)
        if self._fail(argv):
            raise RunError(f"{argv[0]} broke\nwith details")
        getattr(self, f"_{argv[0]}")(stage, stage.folder, argv)

    def _extract(self, stage, folder, argv):
        make_store(stage.output)
        record_stage(stage.output, "extraction", images=4, seconds=10.0)

    def _pretrain(self, stage, folder, argv):
        (folder / "model_final.pth").write_text(" ".join(argv))
        steps, gpus = stage.iterations, int(flag(argv, "--num-gpus"))
        record_stage(folder, "pretraining", images=16 * steps, flops=100, seconds=gpus * steps)
        record_stage(folder, "erf_refresh", seconds=5.0 * gpus)
        _write_metrics(folder, {"iteration": steps - 1, "time": 1.0})

    def _convert(self, stage, folder, argv):
        stage.output.write_text(Path(flag(argv, "--input")).read_text())

    def _finetune(self, stage, folder, argv):
        step = self._scratch_step if flag(argv, "--weights") == "none" else 2.0
        steps, seconds = stage.iterations, step * int(flag(argv, "--num-gpus"))
        score = self._score(flag(argv, "--weights"), int(flag(argv, "SEED")))
        cost = {"images": 8 * steps, "flops": 10 * steps, "seconds": seconds * steps}
        record_stage(folder, "finetuning", **cost)
        record_stage(folder, "evaluation", images=2, seconds=1.5 * seconds)
        metrics = dict.fromkeys(("AP", "AP75", "APs", "APm"), score)
        metrics |= {"AP50": 2 * score, "APl": None}
        (folder / "results.json").write_text(json.dumps({"bbox": metrics}))
        (folder / "model_final.pth").write_text(" ".join(argv))
        last = {"iteration": steps - 1, "bbox/AP": score}
        _write_metrics(folder, {"iteration": 0, "total_loss": 1.0, "time": step}, last)


def _write_metrics(folder: Path, *lines: dict) -> None:
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))

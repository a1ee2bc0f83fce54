"""The script for LightlyTrain's environment, with stand-ins for it and for Lightning."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmark.runner import LIGHTLY_SCRIPT

# A batch takes SECONDS; training dies before step DIES, with a checkpoint of the step before last.
LIGHTNING = """
import os, time

now = [0.0]
time.perf_counter = lambda: now[0]


class Callback:
    pass


class Trainer:
    def __init__(self, max_steps, done):
        self.callbacks, self.should_stop = [], False
        self.max_steps, self.global_step = max_steps, done

    def fit(self, trial):
        (clock,) = self.callbacks
        now[0] += 100  # start-up
        clock.on_train_start(self, None)
        if not self.global_step:  # Lightning calls it for no epoch that it goes on with
            clock.on_train_epoch_start(self, None)
        while self.global_step < self.max_steps and not self.should_stop:
            if not trial and str(self.global_step) == os.environ.get("DIES"):
                raise SystemExit("killed")
            now[0] += 2.0 if trial else float(os.environ["SECONDS"])
            self.global_step += 1
            clock.on_train_batch_end(self, None, None, None, 0)
"""
LIGHTLY = """
import json, os, pathlib, pytorch_lightning


def pretrain(out, epochs, trainer_args, data, resume_interrupted=False, overwrite=False, **options):
    out = pathlib.Path(out)
    for name in ("checkpoints", "exported_models"):
        (out / name).mkdir(parents=True, exist_ok=True)
    said = dict(options, epochs=epochs, images=data, resumed=resume_interrupted)
    (out / "said.json").write_text(json.dumps(said | trainer_args))
    assert os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] == "1"
    (out / "checkpoints" / "last.ckpt").touch()
    trainer = pytorch_lightning.Trainer(trainer_args["max_steps"], 2 if resume_interrupted else 0)
    trainer.fit(out.name == "trial")
    (out / "exported_models" / "exported_last.pt").write_text("weights")
"""


@pytest.fixture
def pretrain(tmp_path: Path):
    """Runs the script for 11 seconds on six images in batches of four."""
    for name, text in (("pytorch_lightning", LIGHTNING), ("lightly_train", LIGHTLY)):
        (tmp_path / f"{name}.py").write_text(text)
    names = [{"file_name": f"{i}.jpg"} for i in range(6)]
    (tmp_path / "train.json").write_text(json.dumps({"images": names}))
    (tmp_path / "out").mkdir()

    def run(*more: str, seconds: str = "2", dies: str = "") -> tuple[int, dict, dict]:
        """(exit status, progress, what LightlyTrain was told)."""
        argv = [sys.executable, str(LIGHTLY_SCRIPT), "--json", str(tmp_path / "train.json")]
        argv += ["--images", "DIR", "--output", str(tmp_path / "out"), "--seconds", "11"]
        found = {"PYTHONPATH": str(tmp_path), "SECONDS": seconds, "DIES": dies}
        argv += ["--seed", "3", *more, "model=torchvision/resnet34", "batch_size=4"]
        status = subprocess.run(argv, env={**os.environ, **found}).returncode
        progress = json.loads((tmp_path / "out" / "progress.json").read_text())
        said = json.loads((tmp_path / "out" / "training" / "said.json").read_text())
        return status, progress, said

    return run


def test_as_many_steps_as_fill_the_time_at_the_trials_speed(pretrain, tmp_path):
    # 11 s / 2 s are 5 whole steps; an epoch is one batch, for the second is not full.
    status, progress, said = pretrain("transform_args.image_size=[64,64]")
    assert status == 0 and (tmp_path / "out" / "weights.pth").read_text() == "weights"
    assert [progress[key] for key in ("steps", "done", "images", "seconds")] == [5, 5, 20, 10.0]
    assert (said["max_steps"], said["epochs"], said["seed"]) == (5, 5, 3)
    assert (said["model"], said["method"], said["accelerator"]) == (
        "torchvision/resnet34", "dino", "cpu",
    )  # fmt: skip
    assert said["transform_args"] == {"image_size": [64, 64]}
    assert said["images"] == [f"DIR/{i}.jpg" for i in range(6)]


def test_the_time_ends_it_where_steps_became_slower(pretrain):
    progress = pretrain(seconds="4")[1]
    assert [progress[key] for key in ("steps", "done", "seconds")] == [5, 3, 12.0]


def test_an_interrupted_run_goes_on_and_counts_lost_steps_once(pretrain, tmp_path):
    status, progress, said = pretrain(dies="3")
    assert status == 1 and not said["resumed"] and progress["seconds"] == 6.0
    assert not (tmp_path / "out" / "weights.pth").exists()
    status, progress, said = pretrain("--resume")  # from the checkpoint of step 2
    assert status == 0 and said["resumed"]
    assert [progress[key] for key in ("steps", "done", "seconds")] == [5, 5, 10.0]
    # Other settings start anew.
    progress, said = pretrain("--resume", "precision=bf16-mixed")[1:]
    assert not said["resumed"] and progress["done"] == 5

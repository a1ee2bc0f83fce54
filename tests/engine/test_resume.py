"""Killed at any moment and resumed, a run has the losses of an unbroken one, bit for bit.

The network has batch norm and dropout, the labels follow the measured ERF: each has a state that a
resume must bring back.
"""

import json
import time
from pathlib import Path

import pytest
import torch
from helpers_run import PYRAMID, read_losses, start, tiny_options, train
from helpers_store import make_store

CONFIG = ["--config-file", "Base-JigsawPretrain.yaml"]
# Seconds and bytes differ from run to run; nothing else may.
MEASURED = ("time", "data_time", "eta_seconds", "images_per_s", "data_wait_share", "erf_share")
MEASURED += ("memory_mb", "erf/seconds")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """A whole run of 45 iterations: two lines of metrics, nine refreshes, fifteen checkpoints."""
    folder = tmp_path_factory.mktemp("unbroken")
    argv = [*CONFIG, *options(folder)]
    assert train(argv, LOSSES=str(folder / "losses")) == 0
    return folder


def options(folder: Path) -> list[str]:
    return tiny_options(folder, "SOLVER.MAX_ITER", 45, "TEST.EVAL_PERIOD", 6)


def metrics(folder: Path) -> list[dict]:
    lines = (folder / "run" / "metrics.json").read_text().splitlines()
    records = sorted((json.loads(line) for line in lines), key=lambda r: r["iteration"])
    return [{k: v for k, v in r.items() if k not in MEASURED} for r in records]


def assert_same_run(folder: Path, unbroken: Path) -> None:
    """Losses of every step, repeated ones too; metrics; final weights, optimiser, generators."""
    expected = dict(read_losses(unbroken / "losses"))
    losses = read_losses(folder / "losses")
    assert {iteration for iteration, _ in losses} == set(range(45))
    assert [(i, loss) for i, loss in losses if loss != expected[i]] == []
    assert metrics(folder) == metrics(unbroken)
    ours, theirs = (
        torch.load(f / "run" / "model_final.pth", weights_only=True) for f in (folder, unbroken)
    )
    for part in ("model", "optimizer", "scheduler"):
        assert flat(ours[part]) == flat(theirs[part]), part
    assert flat(ours["jigsaw"]["rng"]) == flat(theirs["jigsaw"]["rng"])


def flat(value: object) -> object:
    """Nested containers with tensors as bytes, comparable with ==."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {k: flat(v) for k, v in value.items()}
    return [flat(v) for v in value] if isinstance(value, (list, tuple)) else value


def test_killed_in_a_step_in_a_write_and_before_the_tag(unbroken, tmp_path):
    argv = [*CONFIG, *options(tmp_path)]
    run, losses = tmp_path / "run", str(tmp_path / "losses")
    # In a step, after the checkpoint of iteration 5: 6 and 7 are done again.
    assert train(argv, LOSSES=losses, KILL="step 7") == -9
    assert (run / "last_checkpoint").read_text() == "model_0000005.pth"
    # With half of a checkpoint written, under a name that nothing reads.
    resumed = ["--resume", *argv]
    assert train(resumed, LOSSES=losses, KILL="write model_0000023") == -9
    assert (run / "last_checkpoint").read_text() == "model_0000020.pth"
    assert not (run / "model_0000023.pth").exists()
    # Between a whole checkpoint and the file that names it.
    assert train(resumed, LOSSES=losses, KILL="rename model_0000032") == -9
    assert (run / "model_0000032.pth").exists()
    assert (run / "last_checkpoint").read_text() == "model_0000029.pth"
    assert train(resumed, LOSSES=losses) == 0
    assert [i for i, _ in read_losses(tmp_path / "losses")].count(30) == 2
    assert_same_run(tmp_path, unbroken)
    # The ledger counts what was spent: 45 steps, and those that kills made necessary twice.
    ledger = json.loads((run / "cost.json").read_text())["stages"]
    assert ledger["pretraining"]["images"] >= 45 * 4


def test_several_features_resume_bit_for_bit(tmp_path):
    """Each level's ERF weights come back; levels share out the samples, padding does not count."""
    several = (*PYRAMID, "MODEL.JIGSAW.LEVELS", "assign", "MODEL.JIGSAW.ASSIGN_BOX_SIZE", 8)
    several += ("MODEL.JIGSAW.IGNORE_PADDING", True, "MODEL.JIGSAW.SHARED_CLASSIFIER", False)
    states = []
    for name, kill in (("unbroken", ""), ("broken", "step 8")):
        folder = tmp_path / name
        folder.mkdir()
        argv = [*CONFIG, *tiny_options(folder, *several)]
        losses = str(folder / "losses")
        assert train(argv, LOSSES=losses, KILL=kill) == (-9 if kill else 0)
        if kill:
            assert train(["--resume", *argv], LOSSES=losses) == 0
        states.append(torch.load(folder / "run" / "model_final.pth", weights_only=True))
    expected, losses = (dict(read_losses(tmp_path / n / "losses")) for n in ("unbroken", "broken"))
    assert losses == expected and len(losses) == 12
    assert flat(states[0]["model"]) == flat(states[1]["model"])
    assert flat(states[0]["optimizer"]) == flat(states[1]["optimizer"])
    cost = json.loads((tmp_path / "unbroken" / "run" / "cost.json").read_text())["stages"]
    assert 0 < cost["pretraining"]["pyramid_macs_per_image"]
    assert cost["pretraining"]["pyramid_macs_per_image"] < cost["pretraining"]["macs_per_image"]
    text = (tmp_path / "unbroken" / "run" / "metrics.json").read_text()
    assert "erf/p3_outside_share_R1" in text


def test_killed_at_a_moment_of_the_clocks_choosing(unbroken, tmp_path):
    argv = ["--resume", *CONFIG, *options(tmp_path)]  # --resume on nothing starts anew
    for seconds in (0.0, 0.13, 0.31):
        child = start(argv, LOSSES=str(tmp_path / "losses"))
        while child.is_alive() and not (tmp_path / "losses").exists():
            time.sleep(0.01)
        time.sleep(seconds)
        child.kill()
        child.join()
    assert train(argv, LOSSES=str(tmp_path / "losses")) == 0
    assert_same_run(tmp_path, unbroken)


@pytest.mark.parametrize(
    "notice, status, checkpoint",
    [
        ("TERM step 7", 143, "model_0000007.pth"),
        ("INT step 44", 130, "model_final.pth"),
        ("TERM evaluation", 143, "model_before_evaluation.pth"),
    ],
)
def test_told_to_stop_it_leaves_the_step_at_hand(unbroken, tmp_path, notice, status, checkpoint):
    """No step is lost and none done twice; nothing says so in a traceback."""
    argv, losses = [*CONFIG, *options(tmp_path)], str(tmp_path / "losses")
    argv += ["SOLVER.CHECKPOINT_PERIOD", "100"]
    said = tmp_path / "stderr"
    assert train(argv, LOSSES=losses, NOTICE=notice, STDERR=str(said)) == status
    assert (tmp_path / "run" / "last_checkpoint").read_text() == checkpoint
    assert "Traceback" not in said.read_text()
    assert "stopped by SIG" in (tmp_path / "run" / "log.txt").read_text()
    assert train(["--resume", *argv], LOSSES=losses) == 0
    assert [i for i, _ in read_losses(tmp_path / "losses")] == list(range(45))
    assert read_losses(tmp_path / "losses") == read_losses(unbroken / "losses")
    ours, theirs = (
        torch.load(f / "run" / "model_final.pth", weights_only=True) for f in (tmp_path, unbroken)
    )
    assert flat(ours["model"]) == flat(theirs["model"])


def test_starting_over_an_existing_run_is_refused(unbroken, tmp_path):
    config = (unbroken / "run" / "config.yaml").read_text()
    argv = [*CONFIG, *options(unbroken), "SOLVER.BASE_LR", "7.0"]
    errors = tmp_path / "stderr"
    assert train(argv, LOSSES="/dev/null", STDERR=str(errors)) == 2
    assert "holds a run (last_checkpoint); continue it with --resume" in errors.read_text()
    assert (unbroken / "run" / "config.yaml").read_text() == config


def test_another_store_is_refused_on_resume(unbroken, tmp_path):
    make_store(tmp_path / "other", seed=1)
    argv = ["--resume", *CONFIG, *options(unbroken), "DATASETS.TRAIN", f"('{tmp_path / 'other'}',)"]
    errors = tmp_path / "stderr"
    assert train(argv, LOSSES="/dev/null", STDERR=str(errors)) == 2
    assert "changed since the checkpoint was written" in errors.read_text()

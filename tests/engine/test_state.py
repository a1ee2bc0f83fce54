"""state.py: files whole or absent, tags that name a good one, metrics without seams, generators."""

import errno
import os
import random

import numpy as np
import pytest
import torch
from torch import nn

from jigsaw_d2.engine.state import (
    JigsawCheckpointer,
    get_random_state,
    read_checkpoint,
    set_random_state,
    truncate_metrics,
)
from jigsaw_d2.io import CheckpointError, RunError

CPU = torch.device("cpu")


def test_round_trip_returns_the_rest_of_the_state(tmp_path):
    net = nn.Linear(2, 2)
    JigsawCheckpointer(net, str(tmp_path)).save(
        "model_0000004", iteration=4, jigsaw={"a": [1, "b"]}
    )
    other = JigsawCheckpointer(nn.Linear(2, 2), str(tmp_path))
    assert other.has_checkpoint()
    rest = other.load_state(other.get_checkpoint_file())
    assert rest == {"iteration": 4, "jigsaw": {"a": [1, "b"]}}
    assert torch.equal(other.model.weight, net.weight)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_0000004.pth"]


@pytest.mark.parametrize("fail_at", ["torch.save", "os.replace"])
def test_a_failed_save_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, fail_at):
    net = nn.Linear(2, 2)
    checkpointer = JigsawCheckpointer(net, str(tmp_path))
    checkpointer.save("model_final", iteration=1, jigsaw={})
    before = (tmp_path / "model_final.pth").read_bytes()

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fail_at, fail)
        with pytest.raises(RunError, match="model_final.pth: No space left on device; model_final"):
            checkpointer.save("model_final", iteration=2, jigsaw={})
    assert (tmp_path / "model_final.pth").read_bytes() == before
    assert checkpointer.load_state(checkpointer.get_checkpoint_file())["iteration"] == 1


def test_names_or_shapes_of_another_model_are_listed(tmp_path):
    JigsawCheckpointer(nn.Linear(2, 2), str(tmp_path)).save("model_final", jigsaw={})
    with pytest.raises(CheckpointError, match="(?s)of another model.*size mismatch for weight"):
        JigsawCheckpointer(nn.Linear(3, 2)).load_state(tmp_path / "model_final.pth")


def test_missing_damaged_and_foreign_files_are_told_apart(tmp_path):
    torch.save({"model": {}, "jigsaw": {}}, tmp_path / "model_0000001.pth")
    with pytest.raises(CheckpointError, match="model_9.pth is missing.*model_0000001.pth"):
        read_checkpoint(tmp_path / "model_9.pth")
    whole = (tmp_path / "model_0000001.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="half.pth cannot be read"):
        read_checkpoint(tmp_path / "half.pth")
    torch.save({"weight": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="no pre-training checkpoint"):
        read_checkpoint(tmp_path / "other.pth")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("made_by_unpickling",)


def test_nothing_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "jigsaw": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "made_by_unpickling").exists()


def test_metrics_lose_what_is_run_again_and_half_lines(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 19, "a": 1}\n{"iteration": 39, "a": 2}\n{"iteration": 5')
    assert truncate_metrics(path, start_iter=30) == 2
    assert path.read_text() == '{"iteration": 19, "a": 1}\n'
    assert truncate_metrics(path, start_iter=30) == 0
    assert truncate_metrics(path, start_iter=0) == 1
    assert path.read_text() == ""
    assert truncate_metrics(tmp_path / "absent", 0) == 0


def draw() -> tuple:
    legacy = np.random.normal  # one half of a pair is kept inside the generator
    return random.random(), random.gauss(0, 1), float(legacy()), torch.rand(3).tolist()


def test_draws_repeat_after_a_round_trip_through_a_file(tmp_path):
    outside = get_random_state(CPU)
    try:
        draw()
        torch.save(get_random_state(CPU), tmp_path / "state.pth")
        expected = [draw() for _ in range(3)]
        state = torch.load(tmp_path / "state.pth", weights_only=True)
        set_random_state(state, CPU)
        assert [draw() for _ in range(3)] == expected
    finally:
        set_random_state(outside, CPU)

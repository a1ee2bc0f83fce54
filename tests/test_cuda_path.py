"""Pre-training on PyTorch's CUDA path, on devices that compute nothing: see ``fake_cuda``."""

import json
import subprocess
import sys
from pathlib import Path

import fake_cuda
import pytest
from cuda_child import RUNS, shipped_configs

pytestmark = [
    pytest.mark.skipif(bool(fake_cuda.missing()), reason=fake_cuda.missing() or "-"),
    pytest.mark.xdist_group("cuda_path"),  # all look at the same runs, made once
]

COMMANDS = ("eval-only", "convert", "erf", "visualize erf", "visualize labels")
COMMANDS += ("finetune faster_rcnn_R_50_C4_1x", "finetune faster_rcnn_R_50_FPN_1x")
COLLECTIVES = ("all_reduce", "broadcast", "all_gather")
# Without refresh, evaluation or checkpoint, and after the first ten, in which
# DistributedDataParallel waits to measure itself.
PLAIN_STEPS = range(13, 21)


SAME_CODE = shipped_configs()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What ``cuda_child.py`` found, by job: "one_rank", "second_device", "rank0", "rank1"."""
    folder = tmp_path_factory.mktemp("cuda")
    variables = fake_cuda.environment(fake_cuda.build(folder))
    child = str(Path(__file__).with_name("cuda_child.py"))
    subprocess.run([sys.executable, child, str(folder)], env=variables)
    found = {}
    for log in folder.glob("*.log"):
        result = log.with_suffix(".json")
        found[log.stem] = json.loads(result.read_text()) if result.is_file() else {}
        found[log.stem]["log"] = log.read_text()[-3000:]
    return found


def succeeded(runs: dict, job: str, name: str) -> dict:
    assert name in runs[job], runs[job]["log"]
    run = runs[job][name]
    assert not run["error"], run["error"][-3000:]
    return run


def waits(told: list) -> list[str]:
    return [f"{what} at {where}" for what, _, where in told if what.startswith("wait")]


@pytest.mark.parametrize("config, same_code", SAME_CODE.items())
def test_every_configuration_trains_and_resumes(runs, config, same_code):
    """With ERF figures, evaluation and checkpoint."""
    succeeded(runs, "one_rank", same_code)
    assert list(succeeded(runs, "one_rank", f"{same_code} resumed")["steps"]) == ["2", "3"]


@pytest.mark.parametrize("config", sorted(set(SAME_CODE.values())))
def test_no_backbone_or_objective_adds_a_wait(runs, config):
    step = succeeded(runs, "one_rank", config)["steps"]["1"]
    assert len(waits(step)) == 1, waits(step)


@pytest.mark.parametrize("job", ["one_rank", "rank0", "rank1"])
@pytest.mark.parametrize("name", RUNS)
def test_the_host_waits_once_a_step_and_every_20th_for_metrics(runs, job, name):
    steps = succeeded(runs, job, name)["steps"]
    found = {i: waits(steps[str(i)]) for i in PLAIN_STEPS}
    numbers = {i: len(told) for i, told in found.items()}
    assert numbers == {i: 2 if i == 19 else 1 for i in PLAIN_STEPS}, found
    assert all(told[-1].startswith("wait for an event") for told in found.values()), found


@pytest.mark.parametrize("job", ["one_rank", "rank0", "rank1"])
@pytest.mark.parametrize("name", RUNS)
def test_steps_copy_to_the_device_from_pinned_memory(runs, job, name):
    steps = succeeded(runs, job, name)["steps"]
    for i in PLAIN_STEPS:
        copies = [f"{what} at {at}" for what, _, at in steps[str(i)] if what.endswith("to device")]
        assert copies
        assert all(copy.startswith("copy pinned") for copy in copies), copies


@pytest.mark.parametrize("job", ["one_rank", "rank0", "rank1"])
def test_a_compiled_backbone_goes_through_erf_refresh_and_evaluation(runs, job):
    """Without being compiled again for or after them."""
    graphs = succeeded(runs, job, "compiled")["graphs"]
    assert graphs["21"] == graphs["0"] > 0


@pytest.mark.parametrize("name", RUNS)
def test_both_ranks_call_the_same_collectives(runs, name):
    """Through steps, ERF refreshes, evaluation and checkpoints."""
    called = [
        [(what, n) for what, n, _ in succeeded(runs, job, name)["told"] if what in COLLECTIVES]
        for job in ("rank0", "rank1")
    ]
    assert called[0] == called[1]
    assert {what for what, _ in called[0]} >= {"all_reduce", "broadcast"}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_take_up_a_run_on_the_device(runs, command):
    succeeded(runs, "one_rank", command)


def test_the_second_device_of_two(runs):
    """Its loss is read when it has arrived; memory and random state are its own."""
    whole, begun, resumed = (
        succeeded(runs, "second_device", name) for name in ("whole", "begun", "resumed")
    )
    assert any(whole["memory_mb"]) and 0 not in whole["memory_mb"]
    assert begun["random_state"] != whole["random_state"]
    assert resumed["random_state"] == whole["random_state"]

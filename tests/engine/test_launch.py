"""launching.py: several processes compute as one; a lost peer ends the others in words."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from detectron2.utils import comm
from helpers_run import PYRAMID, read_losses, start, tiny_options, torchrun_variables, train
from torch.multiprocessing import ProcessRaisedException

from jigsaw_d2.engine.interrupt import StopNotice
from jigsaw_d2.engine.launch import explained, launch_job
from jigsaw_d2.io import ConfigError, DataError, PeerLostError, RunError

CONFIG = ["--config-file", "Base-JigsawPretrain.yaml"]
# Its loss is a mean over images, none of which sees another: the same however they are shared out.
SEPARABLE = ("MODEL.BACKBONE.NAME", "build_plain_tiny_backbone", "MODEL.RESNETS.NORM", "GN")


def start_ranks(argv: list[str], folder: Path, **environment: str) -> list:
    """Two ranks, as torchrun would start them; KILL concerns rank 1."""
    children = []
    for rank, variables in enumerate(torchrun_variables(2)):
        files = {"LOSSES": str(folder / f"losses{rank}"), "STDERR": str(folder / f"stderr{rank}")}
        killed = environment if rank == 1 else {}
        children.append(start(argv, **variables, **files, **killed))
    return children


def join(children: list, timeout: float = 120) -> list[int]:
    for child in children:
        child.join(timeout)
        if child.exitcode is None:
            for other in children:
                other.kill()
            raise TimeoutError(f"a rank did not end within {timeout} s")
    return [child.exitcode for child in children]


def values(path: Path) -> list[float]:
    return [float.fromhex(loss) for _, loss in read_losses(path)]


def test_two_processes_have_the_loss_curve_of_one(tmp_path):
    options = tiny_options(tmp_path, *SEPARABLE, "MODEL.JIGSAW.ERF.NUM_IMAGES", 4)
    assert train([*CONFIG, *options], LOSSES=str(tmp_path / "one")) == 0
    two = [*CONFIG, *options, "OUTPUT_DIR", str(tmp_path / "two")]
    assert join(start_ranks(two, tmp_path)) == [0, 0]
    one = values(tmp_path / "one")
    assert len(one) == 12 and one[0] != one[-1]
    for rank in (0, 1):
        assert values(tmp_path / f"losses{rank}") == pytest.approx(one, rel=1e-5)


def test_two_processes_train_a_pyramid_as_one_does(tmp_path):
    """Gradients of every level are those of all images, and so are its ERF weights."""
    several = (*PYRAMID, "MODEL.RESNETS.NORM", "", "MODEL.JIGSAW.LEVELS", "assign")
    options = tiny_options(tmp_path, *several, "MODEL.JIGSAW.ASSIGN_BOX_SIZE", 8)
    assert train([*CONFIG, *options], LOSSES=str(tmp_path / "one")) == 0
    two = [*CONFIG, *options, "OUTPUT_DIR", str(tmp_path / "two")]
    assert join(start_ranks(two, tmp_path)) == [0, 0]
    assert values(tmp_path / "losses1") == pytest.approx(values(tmp_path / "one"), rel=1e-5)
    one, both = (
        torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"]
        for name in ("run", "two")
    )
    assert {"erf_weights_p3", "backbone.fpn_lateral4.weight"} <= set(one)
    for name, value in one.items():
        torch.testing.assert_close(both[name], value, rtol=1e-4, atol=1e-6)


def test_two_processes_accumulate_as_one_does(tmp_path):
    options = tiny_options(tmp_path, *SEPARABLE, "SOLVER.ACCUMULATION_STEPS", 2)
    assert train([*CONFIG, *options], LOSSES=str(tmp_path / "one")) == 0
    two = [*CONFIG, *options, "OUTPUT_DIR", str(tmp_path / "two")]
    assert join(start_ranks(two, tmp_path)) == [0, 0]
    assert values(tmp_path / "losses1") == pytest.approx(values(tmp_path / "one"), rel=1e-5)


def test_two_processes_resume_bit_for_bit(tmp_path):
    """With batch norm and dropout: statistics and generators of both ranks come back."""
    store = tiny_options(tmp_path)  # written before the ranks look for it
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    unbroken.mkdir(), broken.mkdir()
    argv = [*CONFIG, *store, "SOLVER.PEER_TIMEOUT", "30", "OUTPUT_DIR", str(unbroken / "run")]
    assert join(start_ranks(argv, unbroken)) == [0, 0]
    argv[-1] = str(broken / "run")
    codes = join(start_ranks(argv, broken, KILL="step 7"))
    assert codes == [2, -9]
    message = (broken / "stderr0").read_text()
    assert "error: rank 0 lost a peer" in message and "SOLVER.PEER_TIMEOUT = 30 s" in message
    assert join(start_ranks(["--resume", *argv], broken)) == [0, 0]
    for rank in (0, 1):
        expected = dict(read_losses(unbroken / f"losses{rank}"))
        losses = read_losses(broken / f"losses{rank}")
        assert {i for i, _ in losses} == set(range(12))
        assert all(loss == expected[i] for i, loss in losses)


def test_a_notice_to_one_of_two_processes_stops_both_at_one_step(tmp_path):
    options = tiny_options(tmp_path, "SOLVER.CHECKPOINT_PERIOD", 100)
    argv = [*CONFIG, *options]
    assert join(start_ranks(argv, tmp_path, NOTICE="TERM step 5")) == [143, 143]
    # They ask each other after the steps 0, 4, 8 ...
    assert (tmp_path / "run" / "last_checkpoint").read_text() == "model_0000008.pth"
    assert join(start_ranks(["--resume", *argv], tmp_path)) == [0, 0]
    for rank in (0, 1):
        assert [i for i, _ in read_losses(tmp_path / f"losses{rank}")] == list(range(12))


WAITING = """
import os, pathlib, sys, time
from jigsaw_d2.engine.interrupt import StopNotice
from jigsaw_d2.engine.launch import launch_job

def wait(folder):
    notice = StopNotice()
    notice.listen()
    (pathlib.Path(folder) / str(os.getpid())).touch()
    while not notice.number:
        time.sleep(0.01)
    sys.exit(128 + notice.number)

if __name__ == "__main__":
    launch_job(wait, 2, dist_url="auto", args=(sys.argv[1],), device="cpu")
"""


def test_a_notice_to_the_process_that_started_the_others_reaches_them(tmp_path):
    (tmp_path / "ranks").mkdir()
    (tmp_path / "job.py").write_text(WAITING)
    command = [sys.executable, str(tmp_path / "job.py"), str(tmp_path / "ranks")]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while len(list((tmp_path / "ranks").iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    said = job.communicate(timeout=60)[1]
    assert job.returncode == 143 and "Traceback" not in said


def test_a_signal_that_comes_while_the_ranks_ask_each_other_is_kept(monkeypatch):
    notice, there = StopNotice(), "jigsaw_d2.engine.interrupt.comm"
    monkeypatch.setattr(f"{there}.get_world_size", lambda: 2)
    monkeypatch.setattr(f"{there}.all_gather", lambda own: notice._note(15, None) or [own, own])
    assert notice.agreed(0) == 0 and notice.agreed(4) == 15


def test_a_rank_that_fails_does_not_wait_for_the_others(tmp_path):
    """It ends with its own words while the other one waits in a collective."""
    options = tiny_options(tmp_path, "SOLVER.PEER_TIMEOUT", 60)
    assert join(start_ranks([*CONFIG, *options], tmp_path, FAIL="step 4"), 50) == [2, 2]
    assert "error: this rank alone is wrong" in (tmp_path / "stderr1").read_text()
    assert "error: rank 0 lost a peer" in (tmp_path / "stderr0").read_text()


def test_ranks_without_a_shared_folder_are_refused(tmp_path):
    """Rank 1 has a run in its OUTPUT_DIR, and a seed; rank 0, whose disk is another, has none."""
    options = tiny_options(tmp_path, "SOLVER.MAX_ITER", 6, "SEED", -1)
    assert train([*CONFIG, *options], LOSSES=str(tmp_path / "one")) == 0
    marker = (tmp_path / "run" / "last_checkpoint").write_text("model_0000002.pth")
    assert marker
    children = []
    for rank, variables in enumerate(torchrun_variables(2)):
        files = {"LOSSES": str(tmp_path / f"losses{rank}"), "STDERR": str(tmp_path / f"err{rank}")}
        folder = ["OUTPUT_DIR", str(tmp_path / ("run" if rank else "elsewhere"))]
        argv = ["--resume", *CONFIG, *options, *folder]
        children.append(start(argv, **variables, **files))
    assert join(children) == [2, 2]
    for rank in (0, 1):
        said = (tmp_path / f"err{rank}").read_text()
        assert "rank 0: iteration 0; rank 1: iteration 3" in said and "shared disk" in said


def test_a_silent_peer_is_given_up_on_in_the_stated_time(tmp_path):
    options = tiny_options(tmp_path, "SOLVER.MAX_ITER", 100000, "SOLVER.PEER_TIMEOUT", 3)
    waiting, silent = start_ranks([*CONFIG, *options], tmp_path)
    while not (tmp_path / "losses1").exists():
        time.sleep(0.05)
    os.kill(silent.pid, signal.SIGSTOP)
    try:
        waiting.join(100)  # far longer than 3 s, for a crowded machine
        assert waiting.exitcode == 2
        assert "said nothing for SOLVER.PEER_TIMEOUT = 3 s" in (tmp_path / "stderr0").read_text()
    finally:
        waiting.kill()
        silent.kill()


def test_evaluation_does_not_depend_on_the_number_of_processes(tmp_path):
    options = tiny_options(tmp_path, *SEPARABLE, "SOLVER.MAX_ITER", 2)
    options += ["DATASETS.TEST", f"('{tmp_path / 'store'}',)", "INPUT.JIGSAW.EVAL_IMAGES", "9"]
    argv = [*CONFIG, *options, "MODEL.JIGSAW.OBJECTIVE", "block_wise", "SOLVER.BASE_LR", "0.0"]
    found = []
    for name, ranks in (("one", 1), ("two", 2)):
        run = [*argv, "OUTPUT_DIR", str(tmp_path / name)]
        if ranks == 1:
            assert train(run, LOSSES=str(tmp_path / "losses")) == 0
        else:
            assert join(start_ranks(run, tmp_path)) == [0, 0]
        last = (tmp_path / name / "metrics.json").read_text().splitlines()[-1]
        found.append({k: v for k, v in json.loads(last).items() if k.startswith("jigsaw/")})
    assert found[0] == found[1] and len(found[0]) > 10


def meet(folder: Path) -> None:
    """Both ranks add up; then rank 1 dies, and rank 0 waits."""
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    (folder / f"rank{comm.get_rank()}").write_text(f"{total.item()} {comm.get_local_rank()}")
    if comm.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def tell(folder: Path) -> None:
    backend = torch.distributed.get_backend()
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    (folder / f"rank{comm.get_rank()}").write_text(f"{backend} {seen!r}")


def test_ranks_on_cpus_leave_the_gpus_of_their_machine_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    launch_job(tell, 2, dist_url="auto", args=(tmp_path,), timeout=60, device="cpu")
    assert [(tmp_path / f"rank{r}").read_text() for r in (0, 1)] == ["gloo ''"] * 2
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"


@pytest.mark.parametrize("torchrun", [False, True])
def test_more_processes_than_gpus_are_refused(monkeypatch, torchrun):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    for name, value in torchrun_variables(2)[1].items() if torchrun else ():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="PyTorch sees 1 GPU"):
        launch_job(print, 2)


def test_torchruns_ranks_join_by_the_device_of_the_config(monkeypatch):
    """A CPU run on a machine with GPUs meets by Gloo and chooses no GPU."""
    for name, value in torchrun_variables(1)[0].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: 1 / 0)
    found = []
    launch_job(lambda: found.append(torch.distributed.get_backend()), 1, device="cpu")
    assert found == ["gloo"]
    monkeypatch.setattr(comm, "_LOCAL_PROCESS_GROUP", None)


def test_detectron2s_launch_starts_ranks_and_tells_which_died(tmp_path):
    with pytest.raises(PeerLostError, match="process 1 of this machine ended .*SIGKILL"):
        launch_job(meet, 2, dist_url="auto", args=(tmp_path,), timeout=60)
    assert (tmp_path / "rank1").read_text() == "2.0 1"


def fail(message: str, other: str) -> None:
    """Rank 1 fails; rank 0 hears of it only as a lost peer."""
    if comm.get_rank() == 1:
        raise ConfigError(message)
    try:
        torch.distributed.all_reduce(torch.ones(1))
    except RuntimeError as error:
        raise PeerLostError(other) from error


def test_an_error_of_ours_in_a_rank_is_told_in_one_line():
    with pytest.raises(RunError, match="^process 1: what is wrong: here$"):
        launch_job(
            fail, 2, dist_url="auto", args=("what is wrong: here", "lost"), timeout=60, device="cpu"
        )


def test_any_other_error_in_a_rank_keeps_its_traceback(monkeypatch):
    def fail(*args: object) -> None:
        raise ProcessRaisedException("Traceback ...\nKeyError: 'x'\n", 1, 4242)

    monkeypatch.setattr("jigsaw_d2.engine.launch.launch", fail)
    with pytest.raises(ProcessRaisedException, match="KeyError"):
        launch_job(print, 2, device="cpu")


def test_one_process_is_called_directly(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    called = []
    launch_job(called.append, 1, args=("x",))
    assert called == ["x"]


def test_other_errors_are_left_alone():
    with pytest.raises(RuntimeError, match="^Connection closed by peer$"), explained(600):
        raise RuntimeError("Connection closed by peer")  # no peers here


@pytest.mark.parametrize(
    "error, kind, said",
    [
        (
            "DataError:Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most "
            "recent call last):\n  File ...\njigsaw_d2.io.DataError: the store changed: a.tar\n",
            DataError,
            "^the store changed: a.tar$",
        ),
        ("RuntimeError:DataLoader worker (pid 7) is killed by signal: Killed. ", RunError, "NUM_W"),
        ("OutOfMemoryError:CUDA out of memory. Tried to", RunError, "lower SOLVER.IMS_PER_BATCH"),
        ("RuntimeError:a bug of ours", RuntimeError, "^a bug of ours$"),
    ],
)
def test_errors_of_workers_and_of_the_machine_are_told_in_words(error, kind, said):
    name, _, text = error.partition(":")
    raised = {"DataError": DataError, "OutOfMemoryError": torch.OutOfMemoryError}
    with pytest.raises(kind, match=said), explained(600):
        raise raised.get(name, RuntimeError)(text)

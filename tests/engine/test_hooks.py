"""hooks.py: what the meter says and books, when checkpoints and averaged statistics are due."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.utils.events import EventStorage

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.cost import CostLog, read_cost_log
from jigsaw_d2.engine.hooks import (
    CheckpointHook,
    MeterHook,
    MeterPrinter,
    memory_mb,
)

CPU = torch.device("cpu")


class Clock:
    """A clock that the test sets."""

    def __init__(self, monkeypatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("jigsaw_d2.engine.hooks.time.perf_counter", lambda: self.now)


def steps(
    hook: MeterHook, storage: EventStorage, clock: Clock, number: int, cost_log: CostLog, **solver
) -> None:
    """``number`` steps of 2 s, half a second of it waiting, of 16 images of 10 x 10 pixels."""
    cfg = get_jigsaw_cfg()
    cfg.INPUT.JIGSAW.TEMPLATE_SIZE, cfg.SOLVER.IMS_PER_BATCH = [10, 10], 16
    cfg.SOLVER.update(solver)
    trainer = SimpleNamespace(storage=storage, iter=0, cfg=cfg, device=CPU, cost_log=cost_log)
    hook.trainer = trainer
    for iteration in range(number):
        trainer.iter = storage.iter = iteration
        hook.before_step()
        clock.now += 2.0
        storage.put_scalar("data_time", 0.5)
        hook.after_step()
        clock.now += 100.0  # an evaluation, a checkpoint: no part of the training's speed


def test_meter_by_hand(tmp_path, monkeypatch):
    clock, storage = Clock(monkeypatch), EventStorage(0)
    cost_log = CostLog(tmp_path, "CPU")
    cost_log.record("erf_refresh", seconds=8.0)  # 4 s of two devices, before the first step
    monkeypatch.setattr("jigsaw_d2.engine.hooks.comm.get_world_size", lambda: 2)
    steps(MeterHook(macs=1000), storage, clock, 20, cost_log)
    latest = {name: value for name, (value, _) in storage.latest().items()}
    assert latest["images_per_s"] == 8.0  # 16 images in 2 s
    assert latest["data_wait_share"] == 0.25
    assert latest["erf_share"] == pytest.approx(4 / 44)  # of 20 x 2 s and 4 s
    assert latest["memory_mb"] > 10
    booked = read_cost_log(tmp_path)["stages"]["pretraining"]
    assert booked["images"] == 320 and booked["pixels"] == 32_000
    # A multiply and an add per MAC, three forward passes' worth per step.
    assert booked["flops"] == 320 * 6 * 1000
    assert booked["seconds"] == pytest.approx(20 * 2 * 2)  # two devices


def test_what_a_checkpoint_holds_is_in_the_cost_log_before_it(tmp_path, monkeypatch):
    clock, storage = Clock(monkeypatch), EventStorage(0)
    hook = MeterHook(macs=1)
    steps(hook, storage, clock, 5, CostLog(tmp_path), CHECKPOINT_PERIOD=3)
    assert read_cost_log(tmp_path)["stages"]["pretraining"]["images"] == 3 * 16
    hook.after_train()
    assert read_cost_log(tmp_path)["stages"]["pretraining"]["images"] == 5 * 16


def test_printer_tells_regions_once_a_step(tmp_path, caplog):
    with EventStorage(19) as storage:
        storage.put_scalar("images_per_s", 12.0)
        storage.put_scalar("data_wait_share", 0.01)
        storage.put_scalar("erf_share", 0.002, smoothing_hint=False)
        for region in (1, 2, 3, 4):
            storage.put_scalar(f"region/R{region}_top1", region / 10, smoothing_hint=False)
        with caplog.at_level("INFO", "jigsaw_d2.engine.hooks"):
            MeterPrinter(CPU).write()
            storage.iter = 20
            MeterPrinter(CPU).write()  # nothing new
    (line,) = caplog.messages
    assert "12.0 images/s" in line and "data wait: 1.0%" in line and "erf: 0.2%" in line
    assert line.endswith("top-1 of R1..R4: 10.0 20.0 30.0 40.0 %")


@pytest.mark.parametrize(
    "period, expected",
    [
        (3, ["model_0000002", "model_0000005", "model_final"]),
        (4, ["model_0000003", "model_final"]),
        (0, ["model_final"]),
    ],
)
def test_checkpoints_are_named_as_detectron2_names_them(period, expected):
    saved = []
    hook = CheckpointHook(period)
    for iteration in range(8):
        hook.trainer = SimpleNamespace(iter=iteration, max_iter=8, save_checkpoint=saved.append)
        hook.after_step()
    assert saved == expected


def test_memory_is_in_mebibytes():
    assert 50 < memory_mb(CPU) < 10**6

"""Steps of the trainer in this process: waits, variants, compilation."""

import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from gpu_checks.bench import AMP_DTYPES, R50, Bench
from gpu_checks.report import Finding, expect, note

from jigsaw_d2.engine.trainer import JigsawTrainer

WRITE_PERIOD = 20  # iterations between two that log
_WAIT = "called a synchronizing CUDA operation"  # as torch's sync debug mode words it


def hidden_waits(bench: Bench) -> Iterator[Finding]:
    """Waits of the host for the GPU in a step, beside the event that it means to wait for."""
    for mode in ("fp32", *AMP_DTYPES):
        size = {"SOLVER.IMS_PER_BATCH": bench.pick(32, 2)}
        with bench.trainer(mode, size) as (trainer, steps):
            steps(3)
            plain = _waits(bench, trainer, 8)
            trainer.iter = WRITE_PERIOD - 1
            logged = _waits(bench, trainer, 1)
        value = f"{len(plain) / 8:.2f} a step {_places(plain)}".strip()
        yield bench.goal(mode, value, "0", not plain)
        value = f"{len(logged)} {_places(logged)}".strip()
        yield bench.goal(f"{mode}, the step that logs", value, "<= 1", len(logged) <= 1)


def compiled(bench: Bench) -> Iterator[Finding]:
    """MODEL.JIGSAW.COMPILE with the default objective, ERF refreshes and evaluations."""
    period = 4
    keys = {
        "SOLVER.IMS_PER_BATCH": bench.pick(64, 2),
        "MODEL.JIGSAW.COMPILE": True,
        "MODEL.JIGSAW.ERF.FIRST_ITER": 0,
        "MODEL.JIGSAW.ERF.PERIOD": period,
        "MODEL.JIGSAW.ERF.NUM_IMAGES": bench.pick(16, 1),
        "TEST.EVAL_PERIOD": period,
    }
    torch.compiler.reset()
    with bench.compiler(), bench.trainer("bf16", keys) as (trainer, steps):
        start = time.perf_counter()
        steps(period + 1)  # past the first evaluation, and the refresh after it
        seconds, graphs = time.perf_counter() - start, _compiled_graphs()
        steps(2 * period)
        later = _compiled_graphs()
        loss = trainer.storage.latest()["total_loss"][0]
    torch.compiler.reset()
    yield note("to compile", f"{seconds:.0f} s, {graphs} graphs")
    value = f"{later - graphs} in {2 * period} iterations"
    yield expect("recompilations after the first evaluation", value, "0", later == graphs > 0)
    yield expect("loss", f"{loss:.4f}", "finite", math.isfinite(loss))


def variants(bench: Bench) -> Iterator[Finding]:
    """Group norm, deformable convolution, accumulation, the device by its number: 3 steps each."""
    cases = {
        "GN": ({}, "jigsaw_R_50_GN.yaml"),
        "DCN": ({}, "jigsaw_R_50_DCN.yaml"),
        "accumulation over 2": ({"SOLVER.ACCUMULATION_STEPS": 2}, R50),
    }
    if not bench.dry:
        cases["cuda:0"] = ({"MODEL.DEVICE": "cuda:0"}, R50)
    for name, (keys, config) in cases.items():
        keys = {**bench.resnet, **keys, "SOLVER.IMS_PER_BATCH": bench.pick(16, 4)}
        with bench.trainer(bench.pick("fp16", "bf16"), keys, config) as (trainer, steps):
            steps(3)
            loss = trainer.storage.latest()["total_loss"][0]
        yield expect(f"{name}: loss", f"{loss:.4f}", "finite", math.isfinite(loss))


def _waits(bench: Bench, trainer: JigsawTrainer, steps: int) -> list[warnings.WarningMessage]:
    """torch's warnings of synchronizing calls in so many iterations; none on a CPU."""
    with warnings.catch_warnings(record=True) as caught, trainer.storage:
        warnings.simplefilter("always")
        if not bench.dry:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(steps):
                trainer.before_step()
                trainer.run_step()
                trainer.after_step()
                trainer.iter += 1
        finally:
            if not bench.dry:
                torch.cuda.set_sync_debug_mode("default")
    return [warning for warning in caught if _WAIT in str(warning.message)]


def _places(caught: list[warnings.WarningMessage]) -> str:
    places = {f"{Path(w.filename).name}:{w.lineno}" for w in caught}
    return ", ".join(sorted(places))


def _compiled_graphs() -> int:
    """That torch.compile has made so far in this process, recompilations included."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]

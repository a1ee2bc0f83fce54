"""Whole runs through the commands: killed and resumed, under torchrun, on to a detector."""

import json
import subprocess
import sys
from collections.abc import Iterator

import torch
from gpu_checks import ROOT
from gpu_checks.bench import R50, Bench
from gpu_checks.report import Finding, expect, note
from helpers_weights import FPN

TRAIN_NET = ROOT / "projects" / "JigsawPretrain" / "train_net.py"


def kill_and_resume(bench: Bench) -> Iterator[Finding]:
    """train_net.py whole: ERF figures, evaluation, checkpoints; killed and resumed, both ways."""
    length, period = bench.pick(60, 24), bench.pick(20, 8)
    keys = {
        "SOLVER.IMS_PER_BATCH": bench.pick(64, 2),
        "SOLVER.BASE_LR": 0.005,  # at 0.02 the loss jumps to 11, and the last bits grow with it
        "SOLVER.WARMUP_ITERS": 5,
        "SOLVER.MAX_ITER": length,
        "SOLVER.CHECKPOINT_PERIOD": period,
        "TEST.EVAL_PERIOD": period,
        "MODEL.JIGSAW.ERF.FIRST_ITER": 0,
        "MODEL.JIGSAW.ERF.PERIOD": period,
        "MODEL.JIGSAW.ERF.NUM_IMAGES": bench.pick(64, 1),
        "DATALOADER.NUM_WORKERS": bench.pick(2, 0),
    }
    ways = {"default": (), "deterministic": ("--deterministic",)}
    whole, killed = (
        {way: Run(bench, f"{way}_{end}", flags, keys) for way, flags in ways.items()}
        for end in ("whole", "killed")
    )
    for way, run in killed.items():
        alive = run.command.wait_for(run.folder / "last_checkpoint")
        status = run.command.kill()
        said = "" if alive else f" {run.command.said()}"
        what = f"{way}: killed after a checkpoint"
        yield expect(what, f"exit {status}{said}", "exit -9", status == -9)
        run.start("--resume")
    for way in ways:
        yield from _compare(bench, way, whole[way], killed[way])


class Run:
    """train_net.py in a folder of its own; may be started more than once."""

    def __init__(self, bench: Bench, name: str, flags: tuple[str, ...], keys: dict) -> None:
        self.folder = bench.folder / name
        self._bench, self._flags = bench, flags
        mode = bench.pick("fp16", "bf16")  # float16 alone has a state of its own: the loss scale
        self._options = bench.options(mode, {**keys, "OUTPUT_DIR": self.folder})
        self.start()

    def start(self, *flags: str) -> None:
        """Start it, once more with ``flags``."""
        argv = ("pretrain", "--config-file", R50, *self._flags, *flags)
        self.command = self._bench.start(*argv, *self._options)

    def losses(self) -> dict[int, float]:
        """{iteration: smoothed total loss} of metrics.json."""
        lines = map(json.loads, (self.folder / "metrics.json").read_text().splitlines())
        return {line["iteration"]: line["total_loss"] for line in lines if "total_loss" in line}

    def weights(self) -> dict[str, torch.Tensor]:
        """The last ones, on the CPU."""
        path = self.folder / "model_final.pth"
        return torch.load(path, map_location="cpu", weights_only=True)["model"]


def _compare(bench: Bench, way: str, whole: Run, resumed: Run) -> Iterator[Finding]:
    """The unbroken run and the resumed one: exit status, losses, last weights."""
    runs = (whole, resumed)
    statuses = [run.command.wait() for run in runs]
    said = " ".join(run.command.said() for run, status in zip(runs, statuses) if status)
    value = f"exit {statuses[0]} and {statuses[1]} {said}".strip()
    yield expect(f"{way}: unbroken and resumed", value, "exit 0 and 0", statuses == [0, 0])
    if statuses != [0, 0]:
        return
    curve, again = whole.losses(), resumed.losses()
    first, last = min(curve), max(curve)
    value = f"{curve[first]:.4f} at {first}, {curve[last]:.4f} at {last}"
    yield bench.goal(f"{way}: loss", value, "falls", curve[last] < curve[first])
    # Killed between a checkpoint and the line of its iteration, a run has no such line.
    worst = max(abs(again[k] / curve[k] - 1) for k in curve.keys() & again.keys())
    one, two = whole.weights(), resumed.weights()
    equal = not worst and all(torch.equal(one[key], two[key]) for key in one)
    value = f"losses within {worst:.2e}, {'' if equal else 'not '}bit for bit"
    exact = way == "deterministic"
    expected = "bit for bit" if exact else "losses within 0.05"
    yield expect(f"{way}: resumed", value, expected, equal if exact else worst < 0.05)


def torchrun(bench: Bench) -> Iterator[Finding]:
    """torchrun with one process (NCCL on a GPU): train_net.py as shipped, 2 iterations."""
    keys = {
        "SOLVER.IMS_PER_BATCH": bench.pick(64, 2),
        **bench.resnet,
        "SOLVER.MAX_ITER": 2,
        "MODEL.JIGSAW.ERF.FIRST_ITER": bench.pick(0, 10**6),
        "OUTPUT_DIR": bench.folder / "torchrun",
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    argv = [TRAIN_NET, "--config-file", R50, *bench.options("", keys)]
    done = subprocess.run([*launcher, *argv], capture_output=True, text=True, cwd=bench.folder)
    said = f" {done.stderr.strip()[-300:]}" if done.returncode else ""
    yield expect("exit status", f"{done.returncode}{said}", "0", done.returncode == 0)
    there = (bench.folder / "torchrun" / "model_final.pth").is_file()
    yield expect("model_final.pth", "written" if there else "missing", "written", there)
    if there:  # what "auto" has chosen
        for line in (bench.folder / "torchrun" / "log.txt").read_text().splitlines():
            if "computing in" in line or "in a trial" in line:
                yield note("log", line.split("INFO: ")[-1])


def commands(bench: Bench) -> Iterator[Finding]:
    """convert and finetune (R50-FPN, AMP, evaluation); erf and visualize erf meanwhile."""
    run, weights = bench.folder / "to_convert", bench.folder / "weights.pkl"
    small = {**bench.resnet, "SOLVER.IMS_PER_BATCH": bench.pick(16, 2), "OUTPUT_DIR": run}
    with bench.trainer("bf16", small) as (trainer, steps):
        steps(1)
        with trainer.storage:
            trainer.iter -= 1
            trainer.save_checkpoint("model_final")
    network = ("--device", bench.device, "--config-file", R50)
    opts = ("--opts", *bench.options("", bench.resnet))
    size = ("--size", *[bench.pick(224, 64)] * 2, "--num-images", bench.pick(4, 1))
    erf = ("--feature", "res5", *size, "--output", bench.folder / "erf")
    drawn = ("--store", bench.store, "--num-images", bench.pick(16, 1))
    started = [
        bench.start("erf", *network, *erf, *opts),
        bench.start(
            "visualize", "erf", *network, *drawn, "--output", bench.folder / "v.png", *opts
        ),
        bench.start("convert", "--input", run, "--output", weights),
    ]
    if started[-1].wait() == 0:
        files = [
            [name, f"{bench.coco}/{name}.json", f"{bench.coco}/images"] for name in ("train", "val")
        ]
        options = {
            "MODEL.DEVICE": bench.device,
            "DATASETS.COCO_FILES": files,
            "DATASETS.TRAIN": ("train",),
            "DATASETS.TEST": ("val",),
            "OUTPUT_DIR": bench.folder / "detector",
            "SOLVER.MAX_ITER": bench.pick(10, 1),
            "SOLVER.AMP.ENABLED": not bench.dry,  # Detectron2's AMP is for GPUs alone
        }
        flat = [item for pair in options.items() for item in pair]
        argv = ("finetune", "--config-file", FPN, "--weights", weights)
        batch = ["SOLVER.IMS_PER_BATCH", bench.pick(4, 1)]
        started.append(bench.start(*argv, *bench.detector_options, *flat, *batch))
    for command in started:
        status = command.wait()
        said = f" {command.said()}" if status else ""
        yield expect(command.name, f"exit {status}{said}", "exit 0", status == 0)
    names = ("erf/erf.png", "v.png", "weights.pkl", "detector/results.json")
    missing = [name for name in names if not (bench.folder / name).is_file()]
    value = f"missing: {', '.join(missing)}" if missing else "written"
    yield expect("files", value, "written", not missing)

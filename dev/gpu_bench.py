"""What the checks of gpu_check.py work with: device and sizes, data, trainers, commands."""

import contextlib
import functools
import gc
import itertools
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PATHS = [str(ROOT / name) for name in ("", "tests", "dev")]
sys.path[:0] = PATHS[:2]  # the tests' helpers make the data

import torch
from bench_train import SyntheticTrainer, trainer_steps
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from helpers_coco import make_coco
from helpers_run import TinyBackbone  # noqa: F401  (registers the dry form's backbone)
from helpers_store import make_store
from helpers_weights import SMALL, THIN_GN
from torch import nn

from jigsaw_d2.__main__ import main as jigsaw_d2
from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.trainer import JigsawTrainer

R50 = "jigsaw_R_50.yaml"
# Every key named, whatever the shipped configs' defaults are. Plain float32 is fastest contiguous.
_AMP = {"SOLVER.AMP.ENABLED": True, "SOLVER.TF32": True, "MODEL.JIGSAW.CHANNELS_LAST": True}
_NO_AMP = {"SOLVER.AMP.ENABLED": False, "SOLVER.TF32": False, "MODEL.JIGSAW.CHANNELS_LAST": False}
MODES = {
    "fp32": _NO_AMP,
    "TF32": _NO_AMP | {"SOLVER.TF32": True, "MODEL.JIGSAW.CHANNELS_LAST": True},
    "fp16": _AMP | {"SOLVER.AMP.DTYPE": "float16"},
    "bf16": _AMP | {"SOLVER.AMP.DTYPE": "bfloat16"},
}
AMP_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# The dry form's: three convolutions on 64-pixel images; a thin ResNet where it must be one.
_DRY = {
    "MODEL.BACKBONE.NAME": "build_plain_tiny_backbone",
    "INPUT.JIGSAW.TEMPLATE_SIZE": [64, 64],
    "INPUT.JIGSAW.TEMPLATE_SPLIT": [32, 32],
}
_DRY_RESNET = {"MODEL.BACKBONE.NAME": "build_resnet_backbone"}
_DRY_RESNET |= dict(zip(THIN_GN[::2], THIN_GN[1::2]))


class Bench:
    """One GPU and full sizes; or, dry, the CPU and tiny ones.

    Attributes:
        dry: the form that only shows that every check runs.
        device: "cuda" or "cpu", MODEL.DEVICE of everything.
        folder: for everything that is written; ``close`` removes it.
        speeds: what the speed checks have measured, by (batch, mode).
    """

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.device = "cpu" if dry else "cuda"
        self.folder = Path(tempfile.mkdtemp(prefix="gpu_check_"))
        self.speeds: dict[tuple[int, str], "Speed"] = {}
        self._names = itertools.count()
        # Of the processes that are started from here.
        paths = filter(None, [*PATHS, os.environ.get("PYTHONPATH")])
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        self._commands = Commands(self.folder)

    def close(self) -> None:
        self._commands.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def pick(self, full: Any, dry: Any) -> Any:
        """What the full form takes, or the dry one."""
        return dry if self.dry else full

    def new_folder(self) -> Path:
        """A name for a run's OUTPUT_DIR, not yet created."""
        return self.folder / f"run_{next(self._names)}"

    @functools.cached_property
    def store(self) -> Path:
        """A sample store; crops of up to 300 pixels, as COCO's are."""
        make_store(self.folder / "store", self.pick(120, 8))
        return self.folder / "store"

    @functools.cached_property
    def coco(self) -> Path:
        """A COCO-format set, see ``helpers_coco.make_coco``."""
        return make_coco(self.folder / "coco", images=self.pick(24, 3))

    @property
    def loader_workers(self) -> int:
        """As many as there are cores to spare and batches' worth of shared memory; at most 14."""
        batches = shared_memory_free() // (2 * batch_bytes(512))  # two wait for each worker
        return max(1, min(14, (os.cpu_count() or 1) - 2, batches))

    def options(self, mode: str = "", keys: Mapping[str, object] = {}) -> list[str]:
        """KEY VALUE overrides of a run in which nothing happens but steps.

        Args:
            mode: one of ``MODES``; "" leaves it to the shipped config.
            keys: further ones, which win.
        """
        store = (str(self.store),)
        merged = {
            "MODEL.DEVICE": self.device,
            "DATASETS.TRAIN": store,
            "DATASETS.TEST": store,
            "OUTPUT_DIR": self.new_folder(),
            "SOLVER.REFERENCE_BATCH_SIZE": 0,
            "SOLVER.BASE_LR": 0.01,  # labels may be random: no loss may diverge
            "SOLVER.MAX_ITER": 10**6,
            "SOLVER.CHECKPOINT_PERIOD": 0,
            "TEST.EVAL_PERIOD": 0,
            "INPUT.JIGSAW.EVAL_IMAGES": self.pick(256, 4),
            "MODEL.JIGSAW.ERF.FIRST_ITER": 10**6,
            "DATALOADER.NUM_WORKERS": 0,
            "CUDNN_BENCHMARK": False,  # too long a start for a few steps
            "SEED": 1,
            **(MODES[mode] if mode else {}),
            **(_DRY if self.dry else {}),
            **keys,
        }
        return [str(item) for pair in merged.items() for item in pair]

    def cfg(self, mode: str, keys: Mapping[str, object] = {}, config: str = R50) -> CfgNode:
        """The same as a config."""
        return get_jigsaw_cfg(config, self.options(mode, keys))

    def twins(self, objective: str) -> tuple[nn.Module, nn.Module, dict[str, torch.Tensor]]:
        """The same pre-training network on the CPU and on the device, and a batch of 8 images.

        Its norms have seen the batch, and its scores and label weights are spread out, so that
        loss and ERF depend on every layer.
        """
        set_tf32(False)
        torch.manual_seed(0)
        keys = {"MODEL.RESNETS.NORM": "BN", "MODEL.JIGSAW.NUM_CLASSES": 8}
        keys["MODEL.JIGSAW.OBJECTIVE"] = objective
        cpu = build_model(self.cfg("fp32", {**keys, "MODEL.DEVICE": "cpu"}))
        height, width = cpu.template.height, cpu.template.width
        batch = {
            "image": torch.randint(256, (8, 3, height, width)).to(torch.uint8),
            "gt_classes": torch.randint(9, (8, 4)),
        }
        nn.init.normal_(cpu.classifier.weight, std=0.02)
        cpu.erf_weights.copy_(torch.rand_like(cpu.erf_weights).softmax(dim=0))
        with torch.no_grad():
            for module in cpu.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = None  # the mean of all batches: of this one
            cpu(batch)
        other = build_model(self.cfg("fp32", keys))
        other.load_state_dict(cpu.state_dict())
        return cpu, other, batch

    @contextlib.contextmanager
    def trainer(
        self,
        mode: str,
        keys: Mapping[str, object] = {},
        config: str = R50,
        real: bool = False,
    ) -> Iterator[tuple[JigsawTrainer, Callable[[int], None]]]:
        """(trainer ready to step, function that runs n steps and waits for the GPU).

        Args:
            real: on the real loader, not on one synthetic batch.
        """
        cfg = self.cfg(mode, keys, config)
        trainer = (JigsawTrainer if real else SyntheticTrainer)(cfg)
        try:
            yield trainer, trainer_steps(trainer)
        finally:
            del trainer
            self.free()

    def free(self) -> None:
        """Give back what dropped trainers held on the device; their loaders end their workers."""
        gc.collect()
        if not self.dry:
            torch.cuda.empty_cache()

    def start(self, *argv: object) -> "Command":
        """Start ``python -m jigsaw_d2 ARGV``, see ``Commands``."""
        return self._commands.start(*argv)

    @property
    def resnet(self) -> dict[str, object]:
        """Keys for a check that needs a ResNet in the dry form too."""
        return _DRY_RESNET if self.dry else {}

    @property
    def detector_options(self) -> list[str]:
        """KEY VALUE overrides that make a detector as small as the dry network is."""
        return [*SMALL, *THIN_GN] if self.dry else []


class Commands:
    """The project's commands in processes of their own.

    Children of a fork server, which has imported everything once and never touched the GPU: as
    good as fresh processes, without ten seconds of imports each.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[Command] = []
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["gpu_bench", "jigsaw_d2.visualization.erf"])

    def start(self, *argv: object) -> "Command":
        log = self._folder / f"command_{len(self._started)}.log"
        arguments = [str(item) for item in argv]
        process = self._context.Process(target=_run_command, args=(arguments, log))
        process.start()
        self._started.append(Command(arguments[0], process, log))
        return self._started[-1]

    def kill(self) -> None:
        """End those that still run."""
        for command in self._started:
            if command.process.is_alive():
                command.kill()


class Command:
    """One running command; it leads a process group of its own."""

    def __init__(self, name: str, process: multiprocessing.Process, log: Path) -> None:
        self.name, self.process, self._log = name, process, log

    def wait(self) -> int:
        """Exit status; the negative signal of a killed one."""
        self.process.join()
        return self.process.exitcode

    def wait_for(self, path: Path) -> bool:
        """Until ``path`` exists; False if the command ends before it does."""
        while not path.exists():
            if not self.process.is_alive():
                return path.exists()
            time.sleep(0.01)
        return True

    def kill(self) -> int:
        """SIGKILL to it and to all that it has started; exit status."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.wait()

    def said(self, characters: int = 300) -> str:
        """The end of what it wrote."""
        text = self._log.read_text(errors="replace") if self._log.exists() else ""
        return text.strip()[-characters:]


def _run_command(argv: list[str], log: Path) -> None:
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    sys.exit(jigsaw_d2(argv))


def set_tf32(enabled: bool) -> None:
    """For the whole process; a trainer sets it anew."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = enabled


def shared_memory_free() -> int:
    """Bytes free in /dev/shm, through which loaders hand over their batches."""
    entry = os.statvfs("/dev/shm")
    return entry.f_bavail * entry.f_frsize


def batch_bytes(images: int) -> int:
    """Of a batch of 224x224 images as it leaves the loader."""
    return images * 3 * 224 * 224

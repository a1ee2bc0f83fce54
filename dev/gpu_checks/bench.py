"""What the checks work with: device and sizes, data, trainers, commands."""

import contextlib
import functools
import gc
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bench_train import SyntheticTrainer, trainer_steps
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from gpu_checks import PATHS
from gpu_checks.commands import Command, Commands
from gpu_checks.report import SKIPPED, Finding, expect
from helpers_coco import make_coco
from helpers_run import TinyBackbone  # noqa: F401  (registers the dry form's backbone)
from helpers_store import make_store
from helpers_weights import SMALL, THIN_GN
from torch import nn

from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.engine.trainer import JigsawTrainer

R50, R18 = "jigsaw_R_50.yaml", "jigsaw_R_18.yaml"
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


@dataclass(frozen=True)
class Speed:
    """Medians of what one mode reached."""

    images: float
    ratio: float


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
        self.speeds: dict[tuple[int, str], Speed] = {}
        self._names = itertools.count()
        # Of the processes that are started from here.
        paths = filter(None, [*PATHS, os.environ.get("PYTHONPATH")])
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        self._commands = Commands(self.folder, brief=dry)

    def close(self) -> None:
        """End all commands and remove the folder."""
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
        return make_coco(self.folder / "coco", images=self.pick(24, 6))

    @property
    def loader_workers(self) -> int:
        """As many as the cores and the shared memory have room for; at most 14."""
        return max(1, min(wanted_workers(), shared_memory_free() // worker_bytes()))

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
        # Not ResNet-50: rounding to float32 alone moves its gradient by 2 % (cosine 0.9998).
        cpu = build_model(self.cfg("fp32", {**keys, "MODEL.DEVICE": "cpu"}, R18))
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
        other = build_model(self.cfg("fp32", keys, R18))
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

    def tidy(self) -> None:
        """End the commands that a check has left, and free what it held."""
        self._commands.kill()
        self.free()

    def free(self) -> None:
        """Give back what dropped trainers held on the device; their loaders end their workers."""
        gc.collect()
        if not self.dry:
            torch.cuda.empty_cache()

    def start(self, *argv: object) -> Command:
        """Start ``python -m jigsaw_d2 ARGV``, see ``Commands``."""
        return self._commands.start(*argv)

    def goal(self, what: str, value: str, expected: str, ok: bool) -> Finding:
        """An expectation that only a GPU can meet."""
        found = expect(what, value, expected, ok)
        return replace(found, status=SKIPPED) if self.dry else found

    @contextlib.contextmanager
    def compiler(self) -> Iterator[None]:
        """torch.compile; dry, without generating code, which takes minutes on a CPU."""
        if not self.dry:
            yield
            return
        quick = functools.partialmethod(nn.Module.compile, backend="aot_eager")
        with mock.patch.object(nn.Module, "compile", quick):
            yield

    @property
    def resnet(self) -> dict[str, object]:
        """Keys for a check that needs a ResNet in the dry form too."""
        return _DRY_RESNET if self.dry else {}

    @property
    def detector_options(self) -> list[str]:
        """KEY VALUE overrides that make a detector as small as the dry network is."""
        return [*SMALL, *THIN_GN] if self.dry else []


def set_tf32(enabled: bool) -> None:
    """For the whole process; a trainer sets it anew."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = enabled


def shared_memory_free() -> int:
    """Bytes free in /dev/shm, through which loaders hand over their batches."""
    entry = os.statvfs("/dev/shm")
    return entry.f_bavail * entry.f_frsize


def wanted_workers() -> int:
    """Of a loader: as many as there are cores to spare; at most 14."""
    return max(1, min(14, (os.cpu_count() or 1) - 2))


def worker_bytes() -> int:
    """Shared memory of one worker: two batches of 512 images wait for the trainer."""
    return 2 * 512 * 3 * 224 * 224

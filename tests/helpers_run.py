"""Tiny pre-training runs for tests: three convolutions, 64-pixel images, the real data path.

Runs that are to be killed, or need several ranks, are children of a fork server, which imports
PyTorch once.
"""

import multiprocessing
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

import detectron2.engine.defaults
import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from helpers_networks import small_pyramid
from helpers_store import make_store
from torch import nn

import jigsaw_d2.engine.pretrain
import jigsaw_d2.tools.pretrain
from jigsaw_d2.config import get_jigsaw_cfg
from jigsaw_d2.engine.trainer import JigsawTrainer
from jigsaw_d2.io import ConfigError
from jigsaw_d2.tools import run_command


class TinyBackbone(Backbone):
    """Stride 32 in three convolutions that overlap, so that cells see across regions.

    Dropout in training, so that random states matter.
    """

    def __init__(self, norm: str, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inside, outside, kernel, stride in ((3, 32, 7, 4), (32, 32, 7, 4), (32, 32, 3, 2)):
            norm_layer = get_norm(norm, outside)
            conv = Conv2d(inside, outside, kernel, stride, kernel // 2, norm=norm_layer)
            layers += [conv, nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"res5": self.dropout(self.layers(images))}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"res5": ShapeSpec(channels=32, stride=32)}


@BACKBONE_REGISTRY.register()
def build_tiny_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TinyBackbone:
    return TinyBackbone(cfg.MODEL.RESNETS.NORM, dropout=0.1)


@BACKBONE_REGISTRY.register()
def build_plain_tiny_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TinyBackbone:
    """Without dropout; with NORM "" its loss is a mean over images, each on its own."""
    return TinyBackbone(cfg.MODEL.RESNETS.NORM, dropout=0.0)


@BACKBONE_REGISTRY.register()
def build_tiny_pyramid(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    return small_pyramid(cfg.MODEL.RESNETS.NORM)


# KEY VALUE pairs of a run with all that several features bring.
PYRAMID = ("MODEL.BACKBONE.NAME", "build_tiny_pyramid", "MODEL.JIGSAW.IN_FEATURES")
PYRAMID += (["p3", "p4", "p5"], "MODEL.JIGSAW.ERF.NUM_IMAGES", 4)


def tiny_options(folder: Path, *overrides: object) -> list[str]:
    """KEY VALUE pairs of a run of 12 iterations on a store beside its OUTPUT_DIR."""
    store = folder / "store"
    if not store.exists():
        make_store(store)
    pairs = {
        "MODEL.DEVICE": "cpu",
        "MODEL.BACKBONE.NAME": "build_tiny_backbone",
        "INPUT.JIGSAW.TEMPLATE_SIZE": [64, 64],
        "INPUT.JIGSAW.TEMPLATE_SPLIT": [32, 32],
        "INPUT.JIGSAW.EVAL_IMAGES": 8,
        "MODEL.JIGSAW.ERF.PERIOD": 5,
        "MODEL.JIGSAW.ERF.NUM_IMAGES": 2,
        "MODEL.JIGSAW.ERF.FIGURES": False,
        "MODEL.JIGSAW.CHANNELS_LAST": False,  # no trial decides, so that runs can be compared
        "SOLVER.AMP.ENABLED": False,
        "SOLVER.IMS_PER_BATCH": 4,
        "SOLVER.REFERENCE_BATCH_SIZE": 0,
        "SOLVER.BASE_LR": 0.05,
        "SOLVER.WARMUP_ITERS": 3,
        "SOLVER.MAX_ITER": 12,
        "SOLVER.CHECKPOINT_PERIOD": 3,
        "TEST.EVAL_PERIOD": 0,
        "DATALOADER.NUM_WORKERS": 0,
        "DATASETS.TRAIN": (str(store),),
        "OUTPUT_DIR": str(folder / "run"),
        "SEED": 3,
    }
    pairs |= dict(zip(overrides[::2], overrides[1::2]))
    return [str(item) for pair in pairs.items() for item in pair]


def tiny_cfg(folder: Path, *overrides: object) -> CfgNode:
    """The same as a config."""
    return get_jigsaw_cfg("Base-JigsawPretrain.yaml", tiny_options(folder, *overrides))


class RecordingTrainer(JigsawTrainer):
    """Appends each step's loss, to the last bit, to the file named by LOSSES."""

    def run_step(self) -> None:
        if os.environ.get("FAIL") == f"step {self.iter}":
            raise ConfigError("this rank alone is wrong")
        super().run_step()
        loss = self.storage.history("total_loss").latest()
        with open(os.environ["LOSSES"], "a") as f:
            f.write(f"{self.iter} {float(loss).hex()}\n")
        if os.environ.get("KILL") == f"step {self.iter}":
            die()
        notify(f"step {self.iter}")

    @classmethod
    def test(cls, *args: object) -> object:
        notify("evaluation")
        return super().test(*args)


def read_losses(path: Path) -> list[tuple[int, str]]:
    """(iteration, loss as hexadecimal float) in the order of the steps."""
    lines = path.read_text().splitlines()
    return [(int(line.split()[0]), line.split()[1]) for line in lines]


def notify(point: str) -> None:
    """Send this process the signal of NOTICE, such as "TERM step 7", if it is for this point."""
    name, _, wanted = os.environ.get("NOTICE", "").partition(" ")
    if wanted == point:
        os.kill(os.getpid(), signal.Signals[f"SIG{name}"])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _command(argv: list[str], environment: dict[str, str]) -> None:
    """In the child: train_net.py with a recording trainer, and a death where KILL says so."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    detectron2.engine.defaults.collect_env_info = str  # seconds of asking compilers for versions
    jigsaw_d2.engine.pretrain.JigsawTrainer = RecordingTrainer
    point, _, name = environment.get("KILL", "").partition(" ")
    save, replace = torch.save, os.replace

    def half_save(content: object, f: object, **options: object) -> None:
        if point == "write" and name in str(getattr(f, "name", "")):
            f.write(b"half a file")
            f.flush()
            die()
        save(content, f, **options)

    def late_replace(source: object, target: object) -> None:
        replace(source, target)
        if point == "rename" and name in str(target):
            die()

    torch.save, os.replace = half_save, late_replace
    code = 1
    try:
        if "STDERR" in environment:
            sys.stderr = open(environment["STDERR"], "a", buffering=1)
        code = run_command(jigsaw_d2.tools.pretrain.main, argv)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)  # threads of a lost process group must not keep the child


def start(argv: list[str], **environment: str) -> multiprocessing.Process:
    """Start train_net.py with ``argv`` in a child.

    ``environment``: LOSSES and STDERR (files), KILL, FAIL and NOTICE (see above), torchrun's
    variables.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jigsaw_d2.engine.pretrain", "pygments.lexers"])
    child = context.Process(target=_command, args=(argv, environment))
    child.start()
    return child


def train(argv: list[str], timeout: float = 120, **environment: str) -> int:
    """Exit status of such a child; -9 for a killed one."""
    child = start(argv, **environment)
    child.join(timeout)
    if child.exitcode is None:
        child.kill()
        raise TimeoutError(f"the run did not end within {timeout} s")
    return child.exitcode


def torchrun_variables(world_size: int) -> list[dict[str, str]]:
    """What torchrun would set for each of its processes on one machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return [{**common, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(world_size)]

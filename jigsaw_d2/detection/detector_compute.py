"""Images, pixels and FLOPs of a detector's training and evaluation, for the ledger of compute."""

import contextlib
import functools
import time
from collections.abc import Iterator

import torch
from detectron2.engine import HookBase
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from jigsaw_d2.cost import TRAIN_FORWARDS, backbone_flops, device_name, record_stage

# Side in pixels of the image on which the backbone's FLOPs per pixel are counted.
_FLOP_SIDE = 128


class LedgerHook(HookBase):
    """Enters the compute of training steps into the ledger, every ``period`` and at the end.

    A kill loses at most the last ``period`` steps, like Detectron2's own metrics.
    """

    def __init__(self, output_dir: str, period: int = 20) -> None:
        self._output_dir = output_dir
        self._period = period
        self._seconds = 0.0
        self._start = 0.0

    def before_train(self) -> None:
        self._stack = contextlib.ExitStack()
        self._count = self._stack.enter_context(counted_images(self.trainer.model, training=True))

    def before_step(self) -> None:
        self._start = time.perf_counter()

    def after_step(self) -> None:
        self._seconds += time.perf_counter() - self._start
        if (self.trainer.iter + 1) % self._period == 0:
            self._flush()

    def after_train(self) -> None:
        self._flush()
        self._stack.close()

    def _flush(self) -> None:
        record_compute(self._output_dir, "finetuning", self._count, self._seconds, TRAIN_FORWARDS)
        self._count.images = self._count.pixels = 0
        self._seconds = 0.0


class Count:
    """What entered a detector's backbone: ``images``, and their ``pixels`` with padding."""

    def __init__(self, backbone: nn.Module) -> None:
        self.images = self.pixels = 0
        self.backbone = backbone

    @functools.cached_property
    def flops_per_pixel(self) -> float:
        """Of a forward pass of the backbone (with FPN); RoI heads are left out."""
        return backbone_flops(self.backbone, _FLOP_SIDE, _FLOP_SIDE) / _FLOP_SIDE**2


@contextlib.contextmanager
def counted_images(model: nn.Module, training: bool) -> Iterator[Count]:
    """Count what enters the backbone of a detector while it is (or is not) in training mode."""
    backbone = unwrapped(model).backbone
    count = Count(backbone)

    def note(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if module.training == training:
            images, _, height, width = inputs[0].shape
            count.images += images
            count.pixels += images * height * width

    handle = backbone.register_forward_pre_hook(note)
    try:
        yield count
    finally:
        handle.remove()


def unwrapped(model: nn.Module) -> nn.Module:
    """The detector inside its wrappers (several GPUs; test-time augmentation)."""
    if isinstance(model, GeneralizedRCNNWithTTA):
        return model.model
    return model.module if isinstance(model, DistributedDataParallel) else model


def record_compute(
    output_dir: str, stage: str, count: Count, seconds: float, forwards: int
) -> None:
    """Enter the whole job's share, taken as this rank's times the number of ranks."""
    if not comm.is_main_process() or count.images == 0:
        return
    ranks = comm.get_world_size()
    record_stage(
        output_dir,
        stage,
        images=count.images * ranks,
        pixels=count.pixels * ranks,
        flops=forwards * count.flops_per_pixel * count.pixels * ranks,
        seconds=seconds * ranks,
        device=device_name(next(count.backbone.parameters()).device),
    )

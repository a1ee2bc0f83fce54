"""What the detector's training and evaluation cost: images, pixels, FLOPs, seconds."""

import functools
import time

import torch
from detectron2.engine import HookBase
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from torch import nn

from jigsaw_d2.cost import TRAIN_FORWARDS, backbone_macs, device_name, record_stage
from jigsaw_d2.engine.optimizer import backbone_of


class ComputeMeter:
    """Counts seconds, images and their pixels, with padding, that enter a detector while open.

    ``stage`` of the cost log: "finetuning", or "evaluation", which has no backward passes.
    """

    def __init__(self, model: nn.Module, output_dir: str, stage: str) -> None:
        self._backbone, self._output_dir = backbone_of(bare(model)), output_dir
        self._stage, self._channels = stage, 3
        self.images, self.pixels, self.seconds = 0, 0, 0.0

    @functools.cached_property
    def flops_per_pixel(self) -> float:
        """Of the backbone with FPN, backward pass included; proposals and RoI heads are not."""
        forwards = TRAIN_FORWARDS if self._stage == "finetuning" else 1
        macs = backbone_macs(self._backbone, 128, 128, self._channels)
        return 2 * forwards * macs / 128**2

    def __enter__(self) -> "ComputeMeter":
        self._handle = self._backbone.register_forward_pre_hook(self._note)
        self._start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds += time.perf_counter() - self._start
        self._handle.remove()

    def _note(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        images, self._channels, height, width = inputs[0].shape
        self.images += images
        self.pixels += images * height * width

    def book(self) -> None:
        """Enter the job's share so far, taken as this rank's times the number of ranks."""
        if comm.is_main_process() and self.images:
            ranks = comm.get_world_size()
            record_stage(
                self._output_dir,
                self._stage,
                images=self.images * ranks,
                pixels=self.pixels * ranks,
                flops=self.flops_per_pixel * self.pixels * ranks,
                seconds=self.seconds * ranks,
                device=device_name(next(self._backbone.parameters()).device),
            )
        self.images, self.pixels, self.seconds = 0, 0, 0.0


class CostLogHook(HookBase):
    """Books the compute of training steps every 20 of them, so that a kill loses no more."""

    def before_train(self) -> None:
        output_dir = self.trainer.cfg.OUTPUT_DIR
        self._meter = ComputeMeter(self.trainer.model, output_dir, "finetuning")

    def before_step(self) -> None:
        self._meter.__enter__()

    def after_step(self) -> None:
        self._meter.__exit__()
        if (self.trainer.iter + 1) % 20 == 0:
            self._meter.book()

    def after_train(self) -> None:
        self._meter.book()


def bare(model: nn.Module) -> nn.Module:
    """The detector inside its wrappers (several GPUs; test-time augmentation)."""
    if isinstance(model, GeneralizedRCNNWithTTA):
        return model.model
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model

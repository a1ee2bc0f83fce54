"""Ledger of the compute that a result cost: images, pixels, FLOPs, seconds and device by stage.

One ``cost.json`` lies in the run's folder. Each stage adds to it as it goes, so it holds what was
spent: across resumes, and with the iterations that a kill made necessary twice (the killed process
takes at most its last 20 steps with it). FLOPs count a multiply and an add as two (2 per MAC); a
training step counts as three forward passes (forward, gradient of the activations, gradient of the
weights).
"""

import contextlib
import fcntl
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape
from torch import nn

from jigsaw_d2.errors import JigsawError

LEDGER_NAME = "cost.json"
STAGES = ("extraction", "pretraining", "erf_refresh", "evaluation", "finetuning")
# Forward passes that a forward and a backward pass cost: the backward pass holds two products,
# one for the activations and one for the weights, of the forward pass's size each.
TRAIN_FORWARDS = 3
# Operators whose multiply-accumulates are counted; the rest of a backbone is below 1 % of them.
_MATMULS = ("conv", "linear", "addmm", "matmul", "bmm", "einsum")


class LedgerError(JigsawError, ValueError):
    """A ledger that cannot be read, or a stage it does not know."""


def record_stage(
    output_dir: str | Path,
    stage: str,
    *,
    images: int = 0,
    pixels: int = 0,
    flops: float = 0,
    seconds: float = 0.0,
    device: str = "",
    **extra: object,
) -> dict:
    """Add to one stage of the ledger in ``output_dir`` and return that stage's totals.

    Counts and seconds are summed over calls (from several processes too: the folder is locked
    meanwhile and the file replaced whole); ``extra`` facts keep the value said last.

    Args:
        images: images computed on; one Jigsaw image counts once.
        pixels: their pixels.
        flops: floating-point operations, two per multiply-accumulate, backward passes included.
        seconds: wall-clock seconds of one device times the number of devices.
        device: name of the device, e.g. ``device_name("cuda")``.

    Raises:
        LedgerError: ``stage`` is not one of STAGES.
    """
    if stage not in STAGES:
        raise LedgerError(f"ledger stage {stage!r}; the stages are {', '.join(STAGES)}")
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        ledger = read_ledger(folder)
        entry = ledger["stages"].setdefault(
            stage, {"images": 0, "pixels": 0, "flops": 0, "seconds": 0.0, "devices": {}}
        )
        entry["images"] += int(images)
        entry["pixels"] += int(pixels)
        entry["flops"] += int(flops)
        entry["seconds"] += float(seconds)
        if device:
            entry["devices"][device] = entry["devices"].get(device, 0.0) + float(seconds)
        entry.update(extra)
        temporary = folder / f"{LEDGER_NAME}.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(ledger, indent=1) + "\n")
        os.replace(temporary, folder / LEDGER_NAME)
    return entry


def read_ledger(output_dir: str | Path) -> dict:
    """{"version": 1, "stages": {stage: totals}} of a run's folder; no stages where none ran yet.

    Raises:
        LedgerError: the file is not a ledger.
    """
    path = Path(output_dir) / LEDGER_NAME
    if not path.is_file():
        return {"version": 1, "stages": {}}
    try:
        ledger = json.loads(path.read_text())
        ledger["stages"].items()
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise LedgerError(
            f"{path} is not a ledger ({error}); move it away to start anew"
        ) from error
    return ledger


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: the kernel lets go of it when the holder dies, whatever the way."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def backbone_macs(backbone: CfgNode | nn.Module, height: int, width: int) -> int:
    """Multiply-accumulates of the convolutions and matrix products of one image's forward pass.

    Args:
        backbone: a backbone (left in its modes and on its device) or a config that builds one.
        height, width: of the image, in pixels.
    """
    if isinstance(backbone, CfgNode):
        backbone = build_backbone(_countable(backbone))
    modes = {module: module.training for module in backbone.modules()}
    parameter = next(backbone.parameters())
    image = torch.zeros(1, 3, height, width, device=parameter.device, dtype=parameter.dtype)
    backbone.eval()
    try:
        counter = FlopCountAnalysis(backbone, image)
        counter.set_op_handle("torchvision::deform_conv2d", _deform_conv_macs)
        counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        counter.tracer_warnings("none")
        counts = counter.by_operator()
    finally:
        for module, training in modes.items():
            module.training = training
    return int(sum(n for op, n in counts.items() if any(word in op for word in _MATMULS)))


def _deform_conv_macs(inputs: list, outputs: list) -> int:
    """Those of the plain convolution of the same shape; sampling at offsets is below 1 % of it."""
    out_channels, in_channels, *kernel = get_shape(inputs[1])
    batch, _, *cells = get_shape(outputs[0])
    return batch * math.prod(cells) * out_channels * in_channels * math.prod(kernel)


def backbone_flops(backbone: CfgNode | nn.Module, height: int, width: int) -> int:
    """FLOPs of one image's forward pass: two per multiply-accumulate of ``backbone_macs``."""
    return 2 * backbone_macs(backbone, height, width)


def _countable(cfg: CfgNode) -> CfgNode:
    """The config with a norm that exists everywhere: which one does not change the count."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.NORM = "BN"
    return cfg


def device_name(device: str | torch.device) -> str:
    """What to call a device in the ledger: the GPU's model, or the CPU's with its cores in use."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = "CPU"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        model = next(
            (x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), model
        )
    return f"{model}, {torch.get_num_threads()} threads"


class Ledger:
    """One run's ledger as its stages see it: folder and device are known, only one rank writes."""

    def __init__(self, output_dir: str | Path, device: str = "", *, writes: bool = True) -> None:
        """
        Args:
            output_dir: the run's folder.
            device: what to call the device, see ``device_name``.
            writes: False on every rank but the main one; its calls then only add to ``seconds``.
        """
        self.output_dir = Path(output_dir)
        self.device = device
        self.writes = writes
        # Seconds per stage recorded by this process, e.g. for the share of time that a stage took.
        self.seconds: dict[str, float] = {}

    def record(self, stage: str, *, seconds: float = 0.0, **amounts: object) -> None:
        """``record_stage`` for this run; ``seconds`` of this process's device."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        if self.writes:
            record_stage(self.output_dir, stage, seconds=seconds, device=self.device, **amounts)

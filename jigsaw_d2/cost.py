"""Cost log of the compute that a result took: images, pixels, FLOPs, seconds, device by stage.

One ``cost.json`` lies in the run's folder. Each stage adds to it as it goes, so it holds what was
spent, across resumes; a kill loses at most 20 steps. FLOPs are two per multiply-accumulate (MAC).
Nothing here brings torch in before a network is counted.
"""

import copy
import fcntl
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from jigsaw_d2.io import CheckpointError, ConfigError, write_text

if TYPE_CHECKING:
    import torch
    from torch import nn

COST_LOG_NAME = "cost.json"
STAGES = ("extraction", "pretraining", "erf_refresh", "evaluation", "finetuning")
# Forward passes that a training step costs: the backward pass has two products of that size, for
# the gradients of activations and of weights.
TRAIN_FORWARDS = 3
# R50 with stride in its 3x3 convolutions, classifier of 1,000 classes included, per 224x224 image.
_R50_MACS = 4_089_184_256
# Known pre-trainings, as images of 224x224 pixels that a ResNet-50 was trained on.
REFERENCES = {
    "Jigsaw, the paper's 64k x 512": 64_000 * 512,
    "ImageNet, 90 epochs": 90 * 1_281_167,
    "ImageNet, 100 epochs": 100 * 1_281_167,
    "ImageNet, fast recipe to 73.8 %": 11_600_000,
    "ImageNet, fast recipe to 76.6 %": 23_000_000,
}
_AMOUNTS = ("images", "pixels", "flops", "seconds")
# Operators whose multiply-accumulates are counted; the rest of a backbone is below 1 % of them.
_MATMULS = ("conv", "linear", "addmm", "matmul", "bmm", "einsum")


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
) -> dict[str, Any]:
    """Add to one of STAGES in the cost log in ``output_dir`` and return that stage's totals.

    Counts and seconds are summed over calls, of several processes too; ``extra`` facts keep the
    value said last.

    Args:
        images: images computed on; one Jigsaw image counts once.
        pixels: their pixels.
        flops: floating-point operations, backward passes included.
        seconds: wall-clock seconds of one device times the number of devices.
        device: name of the device, e.g. ``device_name("cuda")``.

    Raises:
        ConfigError, CheckpointError: an unknown stage; see ``read_cost_log``.
    """
    if stage not in STAGES:
        raise ConfigError(f"stage {stage!r} of a cost log; the stages are {', '.join(STAGES)}")
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # which the kernel undoes when its holder dies
        log = read_cost_log(folder)
        new = {"images": 0, "pixels": 0, "flops": 0, "seconds": 0.0, "devices": {}}
        entry = log["stages"].setdefault(stage, new)
        amounts = (int(images), int(pixels), int(flops), float(seconds))
        for key, amount in zip(_AMOUNTS, amounts):
            entry[key] += amount
        if device:
            entry["devices"][device] = entry["devices"].get(device, 0.0) + float(seconds)
        entry.update(extra)
        write_text(folder / COST_LOG_NAME, json.dumps(log, indent=1) + "\n")
    finally:
        os.close(handle)
    return entry


def read_cost_log(output_dir: str | Path) -> dict[str, Any]:
    """{"version": 1, "stages": {stage: totals}} of a run's folder; no stages where none ran yet.

    Raises:
        CheckpointError: the file is not a cost log.
    """
    path = Path(output_dir, COST_LOG_NAME)
    if not path.is_file():
        return {"version": 1, "stages": {}}
    try:
        log = json.loads(path.read_text())
        log["stages"].items()
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is not a cost log ({error}); move it away") from error
    return log


class CostLog:
    """One run's cost log as its stages see it; ``seconds`` are this process's, per stage.

    ``writes`` is False on every rank but the main one.
    """

    def __init__(self, output_dir: str | Path, device: str = "", *, writes: bool = True) -> None:
        self.output_dir, self.device, self.writes = Path(output_dir), device, writes
        self.seconds: dict[str, float] = {}

    def record(self, stage: str, *, seconds: float = 0.0, **amounts: object) -> None:
        """``record_stage`` for this run; ``seconds`` of this process's device."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        if self.writes:
            record_stage(self.output_dir, stage, seconds=seconds, device=self.device, **amounts)


def format_cost_logs(output_dirs: Sequence[str | Path]) -> str:
    """Table of the stages of one or more folders, summed, and of the references beside them.

    Raises:
        CheckpointError: a folder without a cost log, or with a damaged one.
    """
    logs = []
    for folder in output_dirs:
        logs.append(read_cost_log(folder)["stages"])
        if not logs[-1]:
            hint = "name the folder of a run, or a store"
            raise CheckpointError(f"{folder} holds no {COST_LOG_NAME}; {hint}")
    booked = {stage: [log[stage] for log in logs if stage in log] for stage in STAGES}
    booked["all"] = sum(booked.values(), [])
    rows = [_row(stage, entries) for stage, entries in booked.items() if entries]
    head = ["stage", "images", "Mpixels", "PFLOP", "device hours", "devices"]
    text = tabulate(rows, head, intfmt=",", floatfmt=("", "", ",.1f", ",.4g", ",.3f", ""))
    _, images, own_pixels, own_flops, *_ = _row("", booked["pretraining"] + booked["erf_refresh"])
    if not images:
        return text
    rows = []
    for name, images in REFERENCES.items():
        pixels, flops = images * 224 * 224 / 1e6, 2 * _R50_MACS * TRAIN_FORWARDS * images / 1e15
        multiples = [pixels / own_pixels, flops / own_flops if own_flops else None]
        rows.append([name, images, pixels, flops, *multiples])
    head = ["pre-training with R50 at 224x224", *head[1:4], "pixels/own", "FLOP/own"]
    form = {"intfmt": ",", "floatfmt": ("", "", ",.0f", ",.0f", ",.4g", ",.4g")}
    return f"{text}\n\n{tabulate(rows, head, missingval='-', **form)}"


def _row(name: str, entries: list[dict[str, Any]]) -> list[Any]:
    images, pixels, flops, seconds = (sum(entry[key] for entry in entries) for key in _AMOUNTS)
    devices = sorted({device for entry in entries for device in entry["devices"]})
    return [name, images, pixels / 1e6, flops / 1e15, seconds / 3600, "; ".join(devices)]


def backbone_macs(backbone: "nn.Module", height: int, width: int, channels: int = 3) -> int:
    """Multiply-accumulates of the convolutions and matrix products of one image's forward pass.

    Args:
        backbone: stays as it is.
        height, width, channels: of the image; pixels.
    """
    import torch
    from fvcore.nn import FlopCountAnalysis

    backbone = copy.deepcopy(backbone).eval()
    parameter = next(backbone.parameters())
    image = torch.zeros(1, channels, height, width, device=parameter.device, dtype=parameter.dtype)
    counter = FlopCountAnalysis(backbone, image)
    counter.set_op_handle("torchvision::deform_conv2d", _deform_conv_macs)
    counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    counter.tracer_warnings("none")
    counts = counter.by_operator()
    return int(sum(n for op, n in counts.items() if any(word in op for word in _MATMULS)))


def _deform_conv_macs(inputs: list, outputs: list) -> int:
    """Those of the plain convolution of the same shape; sampling at offsets is below 1 % of it."""
    from fvcore.nn.jit_handles import get_shape

    out_channels, in_channels, *kernel = get_shape(inputs[1])
    batch, _, *cells = get_shape(outputs[0])
    return batch * math.prod(cells) * out_channels * in_channels * math.prod(kernel)


def device_name(device: "str | torch.device") -> str:
    """What to call a device in the log: the GPU's model, or the CPU's with its cores in use."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = (x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    return f"{next(models, 'CPU')}, {torch.get_num_threads()} threads"

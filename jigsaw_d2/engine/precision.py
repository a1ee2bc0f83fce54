"""Number formats of a training step, and which of them this machine runs fastest."""

import logging
import os
import time
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils import comm
from torch import nn

from jigsaw_d2.io import ConfigError
from jigsaw_d2.modeling.activation_checkpointing import checkpoint_activations
from jigsaw_d2.modeling.backbones import unknown_explained

logger = logging.getLogger(__name__)

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# Of a trial: images in its batch on a CPU, where few tell as much as many. On a GPU it has the
# run's: an H200 was faster in bfloat16 at batch 64, and by a fifth in float16 at 512.
_CPU_IMAGES = 4
# Steps before those that count, and these.
_TRIAL_STEPS = {"cuda": (3, 5), "cpu": (1, 2)}
# No further candidate is tried after so many seconds; what was timed until then decides.
_TRIAL_SECONDS = {"cuda": 30.0, "cpu": 3.0}


@dataclass(frozen=True)
class Precision:
    """How the forward pass computes: ``dtype`` under autocast, or None for plain float32."""

    device_type: str
    dtype: torch.dtype | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "Precision":
        """What SOLVER.AMP means on MODEL.DEVICE.

        Raises:
            ConfigError: AMP.DTYPE does not exist, or is "auto", which ``settle_precision`` settles.
        """
        device_type, amp = torch.device(cfg.MODEL.DEVICE).type, cfg.SOLVER.AMP
        if not amp.ENABLED:
            return cls(device_type)
        if amp.DTYPE not in _DTYPES:
            raise ConfigError(
                f"SOLVER.AMP.DTYPE is {amp.DTYPE!r}; choose one of {', '.join(_DTYPES)}, auto"
            )
        return cls(device_type, _DTYPES[amp.DTYPE])

    def autocast(self) -> torch.autocast:
        """Context of the forward pass and the loss."""
        return torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Scales the loss where gradients would underflow (float16); otherwise does nothing."""
        return torch.amp.GradScaler(self.device_type, enabled=self.dtype is torch.float16)


def is_settled(cfg: CfgNode) -> bool:
    """Whether nothing about the number formats is left to a trial."""
    amp = cfg.SOLVER.AMP
    return cfg.MODEL.JIGSAW.CHANNELS_LAST is not None and not (amp.ENABLED and amp.DTYPE == "auto")


def settle_precision(cfg: CfgNode) -> CfgNode:
    """A config whose AMP.DTYPE "auto" and CHANNELS_LAST None are what a few timed steps say.

    Every candidate makes steps of the whole pre-training network on noise, forward and backward:
    float16 and bfloat16 on a GPU (float16 alone where it has no bfloat16), float32 and bfloat16
    on a CPU, in both memory formats unless one is given. Flags of the processor do not tell: with
    the same one, a ResNet-18 step was 1.8 times faster and 1.5 times slower in bfloat16.

    Args:
        cfg: left as it is; NUM_CLASSES and NORM are definite.
    """
    cfg = cfg.clone()
    cfg.defrost()
    if is_settled(cfg):
        return cfg
    seconds = _time_candidates(cfg.clone())
    dtype, channels_last = min(seconds, key=seconds.__getitem__)
    cfg.MODEL.JIGSAW.CHANNELS_LAST = channels_last
    if cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.DTYPE == "auto":
        cfg.SOLVER.AMP.ENABLED = dtype != "float32"
        cfg.SOLVER.AMP.DTYPE = dtype if cfg.SOLVER.AMP.ENABLED else "auto"
    timed = ", ".join(
        f"{name}{' channels_last' if last else ''} {1000 * s:.0f} ms"
        for (name, last), s in seconds.items()
    )
    logger.info(
        "fastest in a trial: %s%s (a step in %s)",
        *(dtype, " channels_last" if channels_last else "", timed),
    )
    return cfg


def _time_candidates(cfg: CfgNode) -> dict[tuple[str, bool], float]:
    """Seconds of a step by (dtype, channels_last), for as many as the time allows."""
    device = torch.device(cfg.MODEL.DEVICE)
    for part in (cfg.MODEL.RESNETS, cfg.MODEL.FPN):
        if "Sync" in part.NORM:
            part.NORM = "BN"  # this process is alone in its trial
    begun, seconds = time.perf_counter(), {}
    cuda = [torch.cuda.current_device()] if device.type == "cuda" else []
    configure_backends(cfg)
    with torch.random.fork_rng(cuda):
        batch = _noise_batch(cfg, device)
        given = cfg.MODEL.JIGSAW.CHANNELS_LAST
        for channels_last in [True, False] if given is None else [given]:
            cfg.MODEL.JIGSAW.CHANNELS_LAST = channels_last
            with unknown_explained(cfg):
                model = build_model(cfg).train()
            if cfg.MODEL.JIGSAW.ACTIVATION_CHECKPOINTING:
                checkpoint_activations(model.backbone)
            for dtype in _dtypes(cfg, device):
                if seconds and time.perf_counter() - begun > _TRIAL_SECONDS[device.type]:
                    return seconds
                precision = Precision(device.type, _DTYPES.get(dtype))
                seconds[dtype, channels_last] = _step_seconds(model, batch, precision)
            del model
    if cuda:
        torch.cuda.empty_cache()
    return seconds


def _dtypes(cfg: CfgNode, device: torch.device) -> list[str]:
    """Names of the candidates: all that "auto" may mean, or the one that is given."""
    amp = cfg.SOLVER.AMP
    if not amp.ENABLED:
        return ["float32"]
    if amp.DTYPE != "auto":
        return [amp.DTYPE]
    if device.type == "cpu":
        return ["float32", "bfloat16"]
    return ["float16", *(["bfloat16"] if torch.cuda.is_bf16_supported(False) else [])]


def _noise_batch(cfg: CfgNode, device: torch.device) -> dict[str, torch.Tensor]:
    solver = cfg.SOLVER
    count = max(solver.IMS_PER_BATCH // (comm.get_world_size() * solver.ACCUMULATION_STEPS), 1)
    count = min(count, _CPU_IMAGES) if device.type == "cpu" else count
    height, width = cfg.INPUT.JIGSAW.TEMPLATE_SIZE
    shape = (count, len(cfg.MODEL.PIXEL_MEAN), height, width)
    # Noise: on blank images batch norm makes subnormal numbers, with which a CPU crawls.
    return {
        "image": torch.randint(256, shape, dtype=torch.uint8, device=device),
        "gt_classes": torch.zeros(count, 4, dtype=torch.int64, device=device),
        "shown_boxes": torch.tensor([0, 0, width, height], device=device).expand(count, 4, 4),
    }


def _step_seconds(model: nn.Module, batch: dict, precision: Precision) -> float:
    """Seconds of a forward and backward pass, the mean of some after others that do not count."""
    warm, counted = _TRIAL_STEPS[precision.device_type]
    for number in range(warm + counted):
        if number == warm:
            _synchronize(precision.device_type)
            start = time.perf_counter()
        with precision.autocast():
            loss = sum(model(batch).values())
        loss.backward()
        model.zero_grad()
    _synchronize(precision.device_type)
    return (time.perf_counter() - start) / counted


def _synchronize(device_type: str) -> None:
    if device_type == "cuda":
        torch.cuda.synchronize()


def configure_backends(cfg: CfgNode) -> None:
    """TF32, cuDNN's trial of algorithms and determinism, for the whole process."""
    deterministic = cfg.SOLVER.DETERMINISTIC
    torch.backends.cuda.matmul.allow_tf32 = cfg.SOLVER.TF32
    torch.backends.cudnn.allow_tf32 = cfg.SOLVER.TF32
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK and not deterministic
    torch.use_deterministic_algorithms(deterministic)
    # Memory filled with nan before use finds bugs, and costs a write of every activation.
    torch.utils.deterministic.fill_uninitialized_memory = False
    if deterministic:  # what cuBLAS asks for, and it is read when its first handle is made
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

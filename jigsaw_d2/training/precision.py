"""Number formats of a training step: AMP with or without loss scaling, TF32."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.config import CfgNode

from jigsaw_d2.config import AMP_DTYPES
from jigsaw_d2.errors import JigsawError

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# CPU flags of units that multiply bfloat16 matrices: x86 (AMX) and ARM. AVX-512's avx512_bf16 is
# left out: on a Xeon that has it without AMX, a ResNet-18 step in bfloat16 took 1.5 times as long
# as one in float32. Where it is fast, SOLVER.AMP.DTYPE bfloat16 insists.
_BFLOAT16_FLAGS = {"amx_bf16", "bf16"}
_CPUINFO = Path("/proc/cpuinfo")


class PrecisionError(JigsawError, ValueError):
    """An AMP setting that does not exist."""


@dataclass(frozen=True)
class Precision:
    """How the forward pass computes: ``dtype`` under autocast, or None for plain float32."""

    device_type: str
    dtype: torch.dtype | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "Precision":
        """What SOLVER.AMP means on MODEL.DEVICE, on this machine."""
        device_type = torch.device(cfg.MODEL.DEVICE).type
        if not cfg.SOLVER.AMP.ENABLED:
            return cls(device_type)
        return cls(device_type, resolve_amp_dtype(cfg.SOLVER.AMP.DTYPE, device_type))

    def autocast(self) -> contextlib.AbstractContextManager:
        """Context of the forward pass and the loss."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Scales the loss where gradients would underflow (float16); otherwise does nothing."""
        return torch.amp.GradScaler(self.device_type, enabled=self.dtype is torch.float16)


def resolve_amp_dtype(name: str, device_type: str) -> torch.dtype | None:
    """The dtype that SOLVER.AMP.DTYPE stands for; None = float32, "auto" without fast hardware.

    Raises:
        PrecisionError: ``name`` is not one of ``config.AMP_DTYPES``.
    """
    if name not in AMP_DTYPES:
        raise PrecisionError(f"SOLVER.AMP.DTYPE is {name!r}; choose one of {', '.join(AMP_DTYPES)}")
    if name != "auto":
        return _DTYPES[name]
    if has_bfloat16(device_type):
        return torch.bfloat16
    return torch.float16 if device_type == "cuda" else None


def has_bfloat16(device_type: str) -> bool:
    """Whether the hardware multiplies bfloat16 faster than float32."""
    if device_type == "cuda":
        return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    if not _CPUINFO.is_file():
        return False
    lines = (line.lower() for line in _CPUINFO.read_text().splitlines())
    flags = (
        line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "features"))
    )
    return bool(_BFLOAT16_FLAGS.intersection(next(flags, ())))


def set_tf32(enabled: bool) -> None:
    """Allow or forbid TF32 in float32 matrix products and convolutions, for the whole process."""
    torch.backends.cuda.matmul.allow_tf32 = enabled
    torch.backends.cudnn.allow_tf32 = enabled

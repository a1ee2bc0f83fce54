"""Installed as ``detectron2/_C.py``: stands in for the compiled ops that PyPI's Detectron2 lacks.

Deformable convolution runs through torchvision, which has the same operator (both descend from one
source) for CPU and CUDA, forward and backward. The ops on rotated boxes have no substitute: they
say so when they are called, never when they are imported.
"""

import torch
from torch import Tensor
from torchvision.ops import deform_conv2d

COMPILED = False  # a compiled detectron2._C has no such name
_REMEDY = (
    "it is one of Detectron2's compiled ops, which the release on PyPI does not contain. Remedy: "
    "build Detectron2 from its own repository (github.com/facebookresearch/detectron2) into this "
    "environment; jigsaw_d2 then uses that build as it is"
)


class MissingOpError(RuntimeError):
    """A compiled op of Detectron2 was called that nothing stands in for."""


def deform_conv(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    deformable_groups: int = 1,
    im2col_step: int = 64,
) -> Tensor:
    """Deformable convolution v1; same arguments and result as Detectron2's ``deform_conv``.

    Args:
        input: (N, C, H, W).
        offset: (N, 2 * deformable_groups * kh * kw, h, w), pixels, (y, x) per kernel element.
        weight: (K, C / groups, kh, kw).
        im2col_step: ignored, it only sized buffers of the compiled op.

    Returns:
        (N, K, h, w), dtype of ``input``.

    Raises:
        ValueError: shapes that do not fit together.
    """
    del im2col_step
    return _deform(
        input, offset, None, weight, None, stride, padding, dilation, groups, deformable_groups
    )


def modulated_deform_conv(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    deformable_groups: int = 1,
) -> Tensor:
    """Deformable convolution v2, with a weight per sampled point.

    As :func:`deform_conv`, and ``mask`` (N, deformable_groups * kh * kw, h, w), ``bias`` (K,).
    """
    return _deform(
        input, offset, mask, weight, bias, stride, padding, dilation, groups, deformable_groups
    )


def _deform(
    input, offset, mask, weight, bias, stride, padding, dilation, groups, deformable_groups
) -> Tensor:
    _check_shapes(input, offset, weight, groups, deformable_groups)
    # Under autocast the offsets may arrive in another precision than the features; torchvision
    # wants one, and half precision would place the sampling points to whole pixels from 2048 on.
    given = (input, offset, mask, weight, bias)
    double = any(t is not None and t.dtype == torch.float64 for t in given)
    dtype = torch.float64 if double else torch.float32
    args = [None if t is None else t.to(dtype) for t in given]
    with torch.autocast(input.device.type, enabled=False):
        x, offset, mask, weight, bias = args
        out = deform_conv2d(x, offset, weight, bias, stride, padding, dilation, mask)
    return out.to(input.dtype)


def _check_shapes(
    input: Tensor, offset: Tensor, weight: Tensor, groups: int, deformable_groups: int
) -> None:
    # torchvision derives both group counts from the shapes: a mismatch would pass unnoticed.
    if input.dim() != 4:
        raise ValueError(f"Expected 4D tensor as input, got {input.dim()}D tensor instead.")
    if input.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"input has {input.shape[1]} channels, but weight {tuple(weight.shape)} with "
            f"groups={groups} takes {weight.shape[1] * groups}"
        )
    wanted = 2 * deformable_groups * weight.shape[2] * weight.shape[3]
    if offset.shape[1] != wanted:
        raise ValueError(
            f"offset has {offset.shape[1]} channels, but a {weight.shape[2]}x{weight.shape[3]} "
            f"kernel with deformable_groups={deformable_groups} takes {wanted}"
        )


def _missing(op: str):
    def raise_missing(*args, **kwargs):
        raise MissingOpError(f"{op} is not available: {_REMEDY}.")

    raise_missing.__name__ = op
    return raise_missing


nms_rotated = _missing("nms_rotated")
box_iou_rotated = _missing("box_iou_rotated")
roi_align_rotated_forward = _missing("roi_align_rotated")
roi_align_rotated_backward = _missing("roi_align_rotated")
InstanceAnnotation = _missing("InstanceAnnotation")
COCOevalEvaluateImages = _missing("COCOevalEvaluateImages")
COCOevalAccumulate = _missing("COCOevalAccumulate")


def get_compiler_version() -> str:
    """For Detectron2's table of the environment."""
    return "none: Detectron2 0.6 from PyPI, compiled ops replaced in Python"


def get_cuda_version() -> str:
    """For Detectron2's table of the environment."""
    return "none"


def has_cuda() -> bool:
    """Whether compiled CUDA code is inside: no."""
    return False

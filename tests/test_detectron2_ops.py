"""What stands in for Detectron2's compiled ops: dev/detectron2_ops.py as Detectron2 calls it."""

import importlib
import itertools
import math
from pathlib import Path

import detectron2
import numpy as np
import pytest
import torch
from detectron2 import layers
from detectron2.layers import nms_rotated
from detectron2.layers.deform_conv import deform_conv, modulated_deform_conv

# A Detectron2 that the user built has compiled ops of its own, tested where they come from.
ADAPTED = (Path(detectron2.__file__).parent / "jigsaw_adaptation.json").is_file()
ours_only = pytest.mark.skipif(not ADAPTED, reason="concerns our adaptation of Detectron2 0.6")


def _bilinear(plane: np.ndarray, y: float, x: float) -> float:
    """Value of ``plane`` between its pixels, zero outside."""
    y0, x0 = math.floor(y), math.floor(x)
    value = 0.0
    for row, column in itertools.product((y0, y0 + 1), (x0, x0 + 1)):
        if 0 <= row < plane.shape[0] and 0 <= column < plane.shape[1]:
            value += (1 - abs(y - row)) * (1 - abs(x - column)) * plane[row, column]
    return value


def _literal(x, offset, mask, weight, bias, stride, padding, dilation, groups, deformable_groups):
    """Deformable convolution as a loop over images, outputs, inputs and kernel elements."""
    x, offset, mask, weight, bias = (t.detach().numpy() for t in (x, offset, mask, weight, bias))
    kernel_h, kernel_w = weight.shape[2:]
    out = np.zeros((x.shape[0], weight.shape[0], *offset.shape[2:]))
    for n, k, oy, ox in np.ndindex(*out.shape):
        total = bias[k]
        for c, ky, kx in np.ndindex(weight.shape[1:]):
            channel = c + weight.shape[1] * (k // (weight.shape[0] // groups))
            part = channel // (x.shape[1] // deformable_groups)
            element = part * kernel_h * kernel_w + ky * kernel_w + kx
            dy, dx = offset[n, 2 * element : 2 * element + 2, oy, ox]
            y = oy * stride - padding + ky * dilation + dy
            column = ox * stride - padding + kx * dilation + dx
            value = _bilinear(x[n, channel], y, column) * mask[n, element, oy, ox]
            total += weight[k, c, ky, kx] * value
        out[n, k, oy, ox] = total
    return torch.from_numpy(out)


def _case(stride, dilation, groups, deformable_groups, seed=0):
    """Random tensors, float64, of a 3x3 deformable convolution of 4 to 4 channels on 6x5 pixels."""
    rng = torch.Generator().manual_seed(seed)
    padding = dilation
    out = [(size + 2 * padding - 2 * dilation - 1) // stride + 1 for size in (6, 5)]

    def draw(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64).requires_grad_()

    x, weight, bias = draw(2, 4, 6, 5), draw(4, 4 // groups, 3, 3), draw(4)
    offset = draw(2, 2 * deformable_groups * 9, *out)
    mask = draw(2, deformable_groups * 9, *out)
    return (x, offset, mask, weight, bias), (stride, padding, dilation, groups, deformable_groups)


CASES = [(1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 2, 1), (1, 1, 1, 2), (2, 2, 2, 2)]


@ours_only
@pytest.mark.parametrize("case", CASES)
def test_deform_convs_equal_the_literal_sum(case):
    tensors, geometry = _case(*case)
    found = modulated_deform_conv(*tensors, *geometry)
    torch.testing.assert_close(found, _literal(*tensors, *geometry))
    x, offset, mask, weight, bias = tensors
    found = deform_conv(x, offset, weight, *geometry)
    ones, none = torch.ones_like(mask), torch.zeros_like(bias)
    torch.testing.assert_close(found, _literal(x, offset, ones, weight, none, *geometry))


@ours_only
@pytest.mark.parametrize("case", [(1, 1, 1, 1), (2, 2, 2, 2)])
def test_deform_convs_have_the_gradients_of_their_values(case):
    (x, offset, mask, weight, bias), geometry = _case(*case)
    # Few pixels: gradcheck moves every input by itself.
    x, size = x[:1, :, :3, :3].detach().requires_grad_(), (3 - 1) // case[0] + 1
    offset = (offset[:1, :, :size, :size] * 0.3).detach().requires_grad_()
    mask = mask[:1, :, :size, :size].detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *t: modulated_deform_conv(*t, *geometry), (x, offset, mask, weight, bias)
    )
    assert torch.autograd.gradcheck(lambda *t: deform_conv(*t, *geometry), (x, offset, weight))


@ours_only
def test_autocast_keeps_sampling_points_exact():
    """bfloat16 features with float32 offsets: computed in float32, handed on in bfloat16."""
    (x, offset, mask, weight, bias), geometry = _case(1, 1, 1, 1)
    x, offset, mask, weight, bias = (t.detach().float() for t in (x, offset, mask, weight, bias))
    exact = modulated_deform_conv(x.bfloat16().float(), offset, mask, weight, bias, *geometry)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = modulated_deform_conv(x.bfloat16(), offset, mask, weight, bias, *geometry)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, exact.bfloat16())


@ours_only
def test_shapes_that_torchvision_would_let_pass_are_refused():
    (x, offset, _, weight, _), (stride, padding, dilation, _, _) = _case(1, 1, 1, 1)
    with pytest.raises(ValueError, match="groups=2 takes 8"):
        deform_conv(x, offset, weight, stride, padding, dilation, 2, 1)
    with pytest.raises(ValueError, match="deformable_groups=2 takes 36"):
        deform_conv(x, offset, weight, stride, padding, dilation, 1, 2)
    with pytest.raises(ValueError, match="4D"):
        deform_conv(x[0], offset, weight)


# ---- ops on rotated boxes: an error at the call, never at the import


@ours_only
def test_rotated_ops_name_themselves_and_the_remedy():
    for module in ("layers.rotated_boxes", "layers.roi_align_rotated", "evaluation.fast_eval_api"):
        importlib.import_module(f"detectron2.{module}")
    box = torch.tensor([[4.0, 4.0, 4.0, 2.0, 30.0]])
    rois = torch.cat([torch.zeros(1, 1), box], dim=1)
    calls = {
        "nms_rotated": lambda: nms_rotated(box, torch.ones(1), 0.5),
        "box_iou_rotated": lambda: layers.rotated_boxes.pairwise_iou_rotated(box, box),
        "roi_align_rotated": lambda: layers.ROIAlignRotated((2, 2), 1.0, 0)(
            torch.zeros(1, 1, 8, 8), rois
        ),
    }
    for op, call in calls.items():
        with pytest.raises(
            RuntimeError, match=f"^{op} is not available.*build Detectron2 from its"
        ):
            call()

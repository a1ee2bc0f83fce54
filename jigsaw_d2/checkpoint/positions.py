"""Position embeddings of another grid, interpolated as Detectron2's ViTDet does."""

import math

import numpy as np
import torch
import torch.nn.functional as F

_ABSOLUTE = ("pos_embed", "absolute_pos_embed")  # (1, tokens, C), or (1, C, h, w)
_RELATIVE_LINES = ("rel_pos_h", "rel_pos_w")  # (2 h - 1, C)
_RELATIVE_TABLES = ("relative_position_bias_table",)  # ((2 h - 1) ** 2, heads), Swin's


def resize_positions(name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """The embeddings that ``array`` has between its cells, float32 in another ``shape``.

    Square grids, bicubic; along one axis linear. A class token in front of the grid is kept.

    Args:
        name: of the tensor, which says what kind it is.

    Returns:
        None if it is none of these, or if the shapes differ in more than the grid.
    """
    last = name.rpartition(".")[2]
    values = torch.from_numpy(np.asarray(array, dtype=np.float32))
    if len(shape) != values.ndim:
        return None
    if last in _RELATIVE_LINES and shape[1:] == array.shape[1:]:
        line = F.interpolate(values.T[None], size=shape[0], mode="linear")
        return line[0].T.contiguous().numpy()
    if last in _RELATIVE_TABLES and shape[1:] == array.shape[1:]:
        table = _resize_tokens(values[None], (1, *shape))
        return None if table is None else table[0]
    if last in _ABSOLUTE and len(shape) == 4 and shape[:2] == array.shape[:2]:
        return F.interpolate(values, size=shape[2:], mode="bicubic", align_corners=False).numpy()
    if last in _ABSOLUTE and len(shape) == 3 and (shape[0], shape[2]) == (1, array.shape[2]):
        return _resize_tokens(values, shape)
    return None


def _resize_tokens(values: torch.Tensor, shape: tuple[int, ...]) -> np.ndarray | None:
    """(1, tokens, C) -> ``shape`` (1, other tokens, C); None unless both are squares."""
    for first in (0, 1):  # tokens in front of the grid
        sides = [math.isqrt(max(count - first, 0)) for count in (values.shape[1], shape[1])]
        if [side * side + first for side in sides] == [values.shape[1], shape[1]]:
            break
    else:
        return None
    channels = values.shape[2]
    grid = values[:, first:].reshape(1, sides[0], sides[0], channels).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(sides[1],) * 2, mode="bicubic", align_corners=False)
    tokens = grid.permute(0, 2, 3, 1).reshape(1, -1, channels)
    return torch.cat([values[:, :first], tokens], dim=1).numpy()

"""The object classes of the demo set: silhouettes and two-tone textures as functions of position.

Pairs of classes share a silhouette and differ in texture alone, and colours are drawn without
regard to the class, so that neither the outline nor the colour tells what an object is.

Every drawing function takes object coordinates u, v (float arrays of one shape; -1..1 over the
object's width and height, v downwards) and returns ``(inside, tone)``: bool silhouette and float
tone in 0..1 that blends the object's two colours.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Drawing = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class ShapeClass:
    """One category: its name, the range of width / height it is drawn with, and how it looks."""

    name: str
    aspect: tuple[float, float]
    draw: Drawing


def _stripes(phase: np.ndarray) -> np.ndarray:
    """Tone that alternates between 0 and 1 with every unit of ``phase``."""
    return (np.floor(phase) % 2).astype(np.float64)


def _target(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    radius = np.hypot(u, v)
    return radius <= 1, _stripes(radius * 4)


def _wheel(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.hypot(u, v) <= 1, _stripes((np.arctan2(v, u) / np.pi + 1) * 5)


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) <= 1


def _board(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return _square(u, v), _stripes(np.floor((u + 1) * 2) + np.floor((v + 1) * 2))


def _crate(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    frame = np.maximum(np.abs(u), np.abs(v)) > 0.75
    diagonals = np.minimum(np.abs(u - v), np.abs(u + v)) < 0.25
    return _square(u, v), (frame | diagonals).astype(np.float64)


def _pole(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return _square(u, v), _stripes((v + 1) * 4)


def _candle(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return _square(u, v), _stripes((u + 1) * 2 + (v + 1) * 3)


def _saw(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    teeth = np.abs((u * 3) % 1 - 0.5) * 2
    return _square(u, v) & (v >= -1 + 0.9 * teeth), (v > 0.4).astype(np.float64)


def _wave(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    distance = np.abs(v - 0.5 * np.sin(u * 1.5 * np.pi))
    return (distance <= 0.5) & (np.abs(u) <= 1), (distance <= 0.2).astype(np.float64)


def _plain_disc(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.hypot(u, v) <= 1, (v + 1) / 2


def _plain_box(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return _square(u, v), (u + 1) / 2


SHAPE_CLASSES = (
    ShapeClass("target", (0.85, 1.2), _target),
    ShapeClass("wheel", (0.85, 1.2), _wheel),
    ShapeClass("board", (0.85, 1.2), _board),
    ShapeClass("crate", (0.85, 1.2), _crate),
    ShapeClass("pole", (0.2, 0.35), _pole),
    ShapeClass("candle", (0.2, 0.35), _candle),
    ShapeClass("saw", (2.5, 4.0), _saw),
    ShapeClass("wave", (2.5, 4.0), _wave),
)

# Objects of no class: the same outlines without the textures, never annotated.
DISTRACTORS = (
    ShapeClass("plain disc", (0.7, 1.4), _plain_disc),
    ShapeClass("plain box", (0.25, 4.0), _plain_box),
)

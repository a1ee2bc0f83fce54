"""What the figures share: boxes on panels, files, pixels."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle


def draw_box(panel: Axes, box: Sequence[float], colour: str, **style: object) -> None:
    """Outline ``box``, XYXY pixels half-open, on a panel that shows an image."""
    x0, y0, x1, y1 = box
    corner = (x0 - 0.5, y0 - 0.5)  # imshow centres pixel 0 on 0
    panel.add_patch(Rectangle(corner, x1 - x0, y1 - y0, fill=False, edgecolor=colour, **style))


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as an image file, the format taken from its suffix."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    return path


def figure_pixels(figure: Figure) -> np.ndarray:
    """The drawn figure as uint8 (3, height, width) RGB, as ``EventStorage.put_image`` takes it."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3].transpose(2, 0, 1))

"""``python -m jigsaw_d2 cost``: lives in ``tools``."""

from jigsaw_d2.tools.cost import build_parser, main  # noqa: F401

"""``python -m jigsaw_d2 convert``: lives in ``tools``."""

from jigsaw_d2.tools.convert import build_parser, main  # noqa: F401

"""``python -m jigsaw_d2 erf``: lives in ``tools``."""

from jigsaw_d2.tools.erf import build_parser, main  # noqa: F401

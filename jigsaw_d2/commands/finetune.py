"""``python -m jigsaw_d2 finetune``: lives in ``tools``."""

from jigsaw_d2.tools.finetune import build_parser, main  # noqa: F401

"""Former place of the command, until every one has moved to ``tools``."""

from jigsaw_d2.tools.store import build_parser, main  # noqa: F401

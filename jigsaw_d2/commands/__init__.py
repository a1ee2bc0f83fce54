"""Command lines, one module each: ``build_parser()`` and ``main(argv) -> exit status``.

Here live argument parsing and what the user reads; the work itself lives in the library.
``projects/JigsawPretrain/*.py`` and ``python -m jigsaw_d2`` both call these.
"""

import sys
from collections.abc import Callable

from jigsaw_d2.errors import JigsawError


def run_command(main: Callable[[list[str] | None], int], argv: list[str] | None = None) -> int:
    """Exit status of ``main(argv)``; a user's mistake becomes one line on stderr and status 2."""
    try:
        return main(argv)
    except (JigsawError, FileNotFoundError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2

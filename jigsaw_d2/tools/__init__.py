"""Command lines, one module each: ``build_parser()`` and ``main(argv) -> exit status``.

Here live argument parsing and what the user reads; the work lives in the rooms of the library.
``projects/JigsawPretrain/*.py`` and ``python -m jigsaw_d2`` both call these. What takes seconds to
import is imported once the arguments are parsed, so that --help answers at once.
"""

import sys
from collections.abc import Callable

from jigsaw_d2.io import JigsawError


def run_command(main: Callable[[list[str] | None], int], argv: list[str] | None = None) -> int:
    """Exit status of ``main(argv)``; what a user or the machine did wrong is one line, and 2."""
    try:
        return main(argv)
    except (JigsawError, FileNotFoundError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except OSError as error:
        if error.errno is None:
            raise
        sys.stderr.write(f"error: {error.filename or 'the system refuses'}: {error.strerror}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("stopped; what is finished is kept\n")
        return 130

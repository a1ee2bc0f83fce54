"""One figure's command, as ``visualize.py`` runs it."""

import argparse
import contextlib
import io
from types import ModuleType

from jigsaw_d2.tools import run_command


def run_figure(module: ModuleType, arguments: list[str]) -> tuple[int, str]:
    """Exit status, and what was printed on either stream."""

    def main(argv: list[str] | None) -> int:
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        for path in module.run(parser.parse_args(argv)):
            print(path)
        return 0

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        return run_command(main, arguments), out.getvalue()

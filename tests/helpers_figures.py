"""One figure's command, as ``visualize.py`` runs it."""

import contextlib
import io

from jigsaw_d2.tools import run_command, visualize


def run_figure(name: str, arguments: list[str]) -> tuple[int, str]:
    """Exit status, and what was printed on either stream."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        return run_command(visualize.main, [name, *arguments]), out.getvalue()

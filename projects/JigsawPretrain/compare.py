#!/usr/bin/env python
"""Compare initialisations at equal budget, over seeds (Tables 1-5, Fig. 7)."""

import sys

from benchmark.compare import main
from jigsaw_d2.commands import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))

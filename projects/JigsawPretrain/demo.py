#!/usr/bin/env python
"""Everything once within minutes of a CPU, on a set drawn from a seed."""

import sys

from benchmark.demo import main
from jigsaw_d2.commands import run_command

if __name__ == "__main__":
    sys.exit(run_command(main))

#!/usr/bin/env python
"""The figures samples, jigsaw, erf and labels: ``python -m jigsaw_d2 visualize``."""

import sys

from jigsaw_d2.tools import run_command
from jigsaw_d2.tools.visualize import main

if __name__ == "__main__":
    sys.exit(run_command(main))

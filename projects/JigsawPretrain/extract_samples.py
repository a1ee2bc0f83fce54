#!/usr/bin/env python
"""Samples out of a detection set (Sec. 3.1): ``python -m jigsaw_d2 extract``."""

import sys

from jigsaw_d2.tools import run_command
from jigsaw_d2.tools.extract import main

if __name__ == "__main__":
    sys.exit(run_command(main))

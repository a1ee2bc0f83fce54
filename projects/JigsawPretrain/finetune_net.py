#!/usr/bin/env python
"""A detector from converted weights (Sec. 4.1): ``python -m jigsaw_d2 finetune``."""

import sys

from jigsaw_d2.tools import run_command
from jigsaw_d2.tools.finetune import main

if __name__ == "__main__":
    sys.exit(run_command(main))
